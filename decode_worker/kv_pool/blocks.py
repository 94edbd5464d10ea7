"""KV as blocks, for a GPU: a paged pool whose block tables have a row for every (sequence, KV head) of every layer.

A block holds `block_size` tokens of one KV head of one layer, K and V under one number, so heads and layers may keep
whatever they like and nothing is lost but the tail of each row's last block. Rows that several sequences read are whole
blocks, which stand in the tables of them all; what of the kept rows fills no block each of them has for itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from decode_worker.eviction.facts import Move
from decode_worker.eviction.ledger import RowLedger
from decode_worker.kv_pool.base import ExportedKV, KVPool, capacities, growth_of
from decode_worker.kv_pool.seen_rows import SeenRows
from decode_worker.kv_pool.slot_tables import BlockKV, SlotTables
from shared.kernels.dispatch import Kernels
from shared.kernels.splits import choose_splits
from shared.kv.layout import KVLayout
from shared.model.spec import TORCH_DTYPES

TRASH_BLOCK = 0
"""Never given out: rows that only fill up a batch write here."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockAllocation:
    """Blocks of one sequence.

    Attributes:
        blocks: [number] int32.
        block_bytes: Bytes of each.
    """

    blocks: np.ndarray
    block_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes taken from the pool."""
        return len(self.blocks) * self.block_bytes


class BlockPool(KVPool[BlockAllocation, BlockKV]):
    """See the module.

    Args:
        capacity: Bytes on the device.
        layout: Of the model.
        device: Where the blocks lie.
        kernels: Of that device.
        block_size: Tokens in a block.
        max_num_seqs: Sequences in one step at most.
        max_tokens: Tokens of one sequence at most, generated ones included.
    """

    def __init__(
        self,
        capacity: int,
        layout: KVLayout,
        *,
        device: torch.device,
        kernels: Kernels,
        block_size: int,
        max_num_seqs: int,
        max_tokens: int,
    ) -> None:
        super().__init__(layout)
        self.kernels = kernels
        self._block_size = block_size
        self._block_bytes = 2 * block_size * layout.row_bytes
        self._num_blocks = capacity // self._block_bytes
        if self._num_blocks < 2:
            raise ValueError(f"capacity must be at least {2 * self._block_bytes} bytes, not {capacity}")
        shape = (self._num_blocks, block_size, layout.head_dim)
        dtype = TORCH_DTYPES[layout.dtype]
        self.key_blocks = torch.zeros(shape, dtype=dtype, device=device)
        self.value_blocks = torch.zeros(shape, dtype=dtype, device=device)
        # a stack, of which the first `_num_free` are free: who comes next gets the blocks that were in use last
        self._stack = np.arange(self._num_blocks - 1, TRASH_BLOCK, -1, dtype=np.int32)
        self._num_free = len(self._stack)
        self._used = np.zeros(self._num_blocks, dtype=np.bool_)
        self.tables = SlotTables(
            layout=layout,
            slots=max_num_seqs,
            max_blocks=min(-(-max_tokens // block_size), self._num_blocks),
            trash_block=TRASH_BLOCK,
            device=device,
        )
        self._processors = _processors(device)
        # of their own: in the stream of the steps a step would wait for the copies that were issued before it
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def capacity(self) -> int:
        """See `KVPool`; the trash block does not count."""
        return (self._num_blocks - 1) * self._block_bytes

    @property
    def used_bytes(self) -> int:
        """See `KVPool`."""
        return (len(self._stack) - self._num_free) * self._block_bytes

    @property
    def fragmentation(self) -> float:
        """See `KVPool`; any free block serves any row."""
        return 0.0

    def sequence_bytes(self, num_kept: Sequence[int], growth: int | Sequence[int]) -> int:
        """See `KVPool`."""
        return sum(map(self._blocks_for, capacities(num_kept, growth))) * self._block_bytes

    def bound_bytes(self, kept_tokens: int, growth: int) -> int:
        """See `KVPool`; at worst every row begins a block for one token."""
        rows = self.layout.num_layers * self.layout.num_kv_heads
        return rows * (kept_tokens + growth + self._block_size - 1) // self._block_size * self._block_bytes

    def shareable(self, num_kept: Sequence[int]) -> tuple[int, ...]:
        """See `KVPool`; whole blocks."""
        return tuple(kept // self._block_size * self._block_size for kept in num_kept)

    def shared_bound_bytes(self, kept_tokens: int) -> int:
        """See `KVPool`."""
        rows = self.layout.num_layers * self.layout.num_kv_heads
        return rows * kept_tokens // self._block_size * self._block_bytes

    def own_bound_bytes(self, growth: int) -> int:
        """See `KVPool`; at worst all but one row of a block are left of each head's kept ones."""
        rows = self.layout.num_layers * self.layout.num_kv_heads
        return rows * self._blocks_for(growth + self._block_size - 1) * self._block_bytes

    def place(
        self,
        allocation: BlockAllocation,
        num_kept: Sequence[int],
        growth: int,
        eviction: RowLedger | None = None,
        seen: SeenRows | None = None,
        shared: BlockKV | None = None,
    ) -> BlockKV:
        """See `KVPool`."""
        shape = (self.layout.num_layers, self.layout.num_kv_heads)
        rows = np.array(num_kept, dtype=np.int64).reshape(shape)
        capacity = np.array(capacities(num_kept, growth_of(growth, eviction)), dtype=np.int64).reshape(shape)
        settled = eviction and eviction.settled(int(capacity.max()), self.key_blocks.device)
        return BlockKV(
            kept=rows if shared is None else shared.kept + rows,
            room=growth,
            eviction=settled,
            seen=seen,
            shared=shared,
            blocks=self._deal(allocation, capacity, shared),
        )

    def fill(self, kv: BlockKV, body: memoryview) -> None:
        """See `KVPool`."""
        parcel = np.frombuffer(body, dtype=np.uint8).reshape(-1, self.layout.row_bytes)
        with self._copying():
            for tokens, places, rows in self._pieces(kv, kv.shared_lengths, kv.kept):
                # through a copy: torch wraps no read-only buffer without a warning, and numpy knows no bfloat16
                chosen = torch.from_numpy(parcel[rows].copy()).view(tokens.dtype)
                tokens.index_copy_(0, places, chosen.to(tokens.device))

    def export(self, kv: BlockKV) -> ExportedKV:
        """See `KVPool`."""
        lengths = kv.lengths
        parcel = np.empty((2 * int(lengths.sum()), self.layout.row_bytes), dtype=np.uint8)
        with self._copying():
            for tokens, places, rows in self._pieces(kv, np.zeros_like(lengths), lengths):
                parcel[rows] = tokens.index_select(0, places).view(torch.uint8).cpu().numpy()
        return ExportedKV(
            num_kept=tuple(lengths.ravel().tolist()),
            body=parcel.reshape(-1).data,
            eviction=kv.eviction_outside,
            seen=kv.seen_outside,
        )

    def complete(self, batch: Sequence[BlockKV]) -> None:
        """See `KVPool`."""
        super().complete(batch)
        for kv in batch:
            if kv.eviction is not None:
                self.tables.measure(kv)

    def keys(self, kv: BlockKV, layer: int, number: int) -> torch.Tensor:
        """See `RowAccess`."""
        blocks = self.tables.blocks_of(kv)[layer, :, : self._blocks_for(number)].long()
        return self.key_blocks[blocks].flatten(1, 2)[:, :number]

    def rows(self, kv: BlockKV, layer: int, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowAccess`."""
        places = self._rows_at(kv, layer, chosen)
        return self.key_blocks[places], self.value_blocks[places]

    def write(self, kv: BlockKV, layer: int, chosen: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `RowMemory`."""
        places = self._rows_at(kv, layer, chosen)
        self.key_blocks[places], self.value_blocks[places] = keys, values

    def splits(self, batch: int) -> int:
        """Programs per KV head in a step of `batch` sequences of any length."""
        longest = self.tables.blocks.shape[-1] * self._block_size
        return choose_splits(batch, self.layout.num_kv_heads, longest, self._processors)

    def _check_memory(self) -> None:
        free = self._stack[: self._num_free]
        assert len(np.unique(free)) == self._num_free, "a block is free twice"
        assert not self._used[free].any(), "a used block is free"
        assert not self._used[TRASH_BLOCK]
        assert self._num_free + np.count_nonzero(self._used) == len(self._stack), "blocks were lost"

    def _is_allocated(self, allocation: BlockAllocation) -> bool:
        return bool(self._used[allocation.blocks].all())

    def _shrink(self, allocation: BlockAllocation, nbytes: int) -> BlockAllocation:
        count = -(-nbytes // self._block_bytes)
        assert count <= len(allocation.blocks), "shrink cannot grow"
        self._release(allocation.blocks[count:])
        return BlockAllocation(blocks=allocation.blocks[:count], block_bytes=self._block_bytes)

    def _free(self, allocation: BlockAllocation) -> None:
        self._release(allocation.blocks)

    def _allocate(self, nbytes: int) -> BlockAllocation | None:
        count = -(-nbytes // self._block_bytes)
        if count > self._num_free:
            return None
        taken = self._stack[self._num_free - count : self._num_free][::-1].copy()
        self._num_free -= count
        self._used[taken] = True
        return BlockAllocation(blocks=taken, block_bytes=self._block_bytes)

    def _attention(self, batch: Sequence[BlockKV]) -> BlockAttention:
        slots = torch.tensor(self.tables.bind(batch), device=self.key_blocks.device)
        self.tables.advance(slots)
        return BlockAttention(self, slots)

    def _move(self, kv: BlockKV, move: Move) -> None:
        table = self.tables.blocks_of(kv).flatten(0, 1)[move.heads].long()
        places = [
            (table.gather(1, rows[:, None] // self._block_size)[:, 0], rows % self._block_size)
            for rows in (move.source, move.target)
        ]
        for blocks in (self.key_blocks, self.value_blocks):
            blocks[places[1]] = blocks[places[0]]

    def _rows_at(self, kv: BlockKV, layer: int, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of some rows of a layer, and which of each block's."""
        blocks = self.tables.blocks_of(kv)[layer].long().gather(1, chosen // self._block_size)
        return blocks, chosen % self._block_size

    def _release(self, blocks: np.ndarray) -> None:
        assert self._used[blocks].all(), "a block was given back twice"
        self._used[blocks] = False
        self._stack[self._num_free : self._num_free + len(blocks)] = blocks
        self._num_free += len(blocks)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _deal(self, allocation: BlockAllocation, tokens: np.ndarray, shared: BlockKV | None) -> np.ndarray:
        """Gives every row its blocks, shared ones first; [num_layers, num_kv_heads, most blocks of a row]."""
        first = np.zeros_like(tokens) if shared is None else shared.kept // self._block_size
        ends = first - (-tokens // self._block_size)
        place = np.arange(ends.max())
        table = np.full((*tokens.shape, len(place)), TRASH_BLOCK, dtype=np.int32)
        own = (place >= first[..., None]) & (place < ends[..., None])
        table[own] = allocation.blocks[: own.sum()]
        if shared is not None:
            common = place < first[..., None]
            table[common] = shared.blocks[np.arange(shared.blocks.shape[-1]) < first[..., None]]
        return table

    def _pieces(
        self, kv: BlockKV, begins: np.ndarray, ends: np.ndarray
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
        """Layer by layer, but for those without any, the K of each head's tokens from `begins` to `ends`, then their V.

        A layer at a time, since what is on its way takes memory beside the pool's.

        Yields:
            The pool's tokens [number, head_dim], which of them it is, and their rows in a parcel body.
        """
        row = 0
        for table, begin, end in zip(kv.blocks, begins, ends, strict=True):
            if (begin == end).all():
                continue
            places = self._places(table, begin, end)
            for blocks in (self.key_blocks, self.value_blocks):
                yield blocks.view(-1, self.layout.head_dim), places, slice(row, row + len(places))
                row += len(places)

    def _places(self, table: np.ndarray, begin: np.ndarray, end: np.ndarray) -> torch.Tensor:
        """Which of the pool's tokens those of each head of a layer are, from `begin` [num_kv_heads] to `end`; int64."""
        token = np.arange(end.max())
        places = table[:, token // self._block_size].astype(np.int64) * self._block_size + token % self._block_size
        wanted = (token >= begin[:, None]) & (token < end[:, None])
        return torch.from_numpy(places[wanted]).to(self.key_blocks.device)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies made inside are done at its end, however it ends."""
        try:
            with torch.cuda.stream(self._copies):
                yield
        finally:
            if self._copies:
                self._copies.synchronize()


class BlockAttention:
    """The `LayerHook` of one step over blocks; everything it does can be captured in a CUDA graph.

    Args:
        pool: Whose blocks.
        slots: [batch] int64, the sequences' slots in the pool's tables, whose lengths count the new tokens already.
    """

    def __init__(self, pool: BlockPool, slots: torch.Tensor) -> None:
        self._pool = pool
        self._slots = slots
        self._splits = pool.splits(len(slots))

    def part(self, members: Sequence[int]) -> BlockAttention:
        """See `StepAttention`."""
        return BlockAttention(self._pool, self._slots[list(members)])

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; one query per sequence."""
        assert mask is None, "a ragged batch has no mask"
        self.append(layer, key[:, :, 0], value[:, :, 0])
        kernels = self._pool.kernels
        first = self._pool.tables.first_seen(layer)
        return kernels.paged_attention(query[:, :, 0], *self._where(layer), scaling, self._splits, first)[:, None]

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """See `StepAttention`."""
        self._pool.kernels.append_token(key, value, *self._where(layer))

    def _where(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        pool, tables = self._pool, self._pool.tables
        return pool.key_blocks, pool.value_blocks, tables.blocks[layer], tables.lengths[layer], self._slots


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
