"""KV as slabs, for the CPU: one buffer, one contiguous extent per sequence.

Inside an extent every layer and KV head has one slab for K and one for V, with room for the tokens to come, so
attention reads contiguous memory and no block table is needed. Rows that several sequences share are an extent without
such room; each sequence then goes on in slabs of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from decode_worker.eviction.facts import Move
from decode_worker.eviction.ledger import RowLedger
from decode_worker.kv_pool.base import ExportedKV, KVPool, SequenceKV, capacities, growth_of
from decode_worker.kv_pool.parts import joined
from decode_worker.kv_pool.seen_rows import SeenRows
from shared.kernels.dispatch import SlabAttention as SlabKernel
from shared.kernels.dispatch import kernels_for
from shared.kernels.reference.slab_attention import SharedSlabs
from shared.kv.extents import ALIGNMENT, Extent, ExtentAllocator, aligned
from shared.kv.layout import KVLayout
from shared.model.spec import TORCH_DTYPES


@dataclass(eq=False, kw_only=True)
class SlabKV(SequenceKV):
    """Where a sequence's slabs are.

    Attributes:
        capacity: [num_layers, num_kv_heads] int64, rows of each slab, without those that are shared.
        key_at: [num_layers, num_kv_heads] int64, where K begins, in elements from the start of the pool.
        value_at: As `key_at`.
    """

    capacity: np.ndarray
    key_at: np.ndarray
    value_at: np.ndarray
    shared: SlabKV | None = None

    @property
    def own_lengths(self) -> np.ndarray:
        """[num_layers, num_kv_heads] int64, rows in its own slabs."""
        return self.lengths - self.shared_lengths


class SlabPool(KVPool[Extent, SlabKV]):
    """See the module."""

    def __init__(self, capacity: int, layout: KVLayout) -> None:
        super().__init__(layout)
        self._extents = ExtentAllocator(capacity)
        self._bytes = _memory(self._extents.capacity)
        self._kernel = kernels_for(torch.device("cpu")).slab_attention

    @property
    def capacity(self) -> int:
        """See `KVPool`."""
        return self._extents.capacity

    @property
    def used_bytes(self) -> int:
        """See `KVPool`."""
        return self._extents.used_bytes

    @property
    def fragmentation(self) -> float:
        """See `KVPool`."""
        free = self._extents.free_bytes
        return 1 - self._extents.largest_free / free if free else 0.0

    def sequence_bytes(self, num_kept: Sequence[int], growth: int | Sequence[int]) -> int:
        """See `KVPool`."""
        return self.layout.body_bytes(capacities(num_kept, growth))

    def bound_bytes(self, kept_tokens: int, growth: int) -> int:
        """See `KVPool`."""
        return self.layout.full_bytes(kept_tokens + growth)

    def shareable(self, num_kept: Sequence[int]) -> tuple[int, ...]:
        """See `KVPool`; all of them."""
        return tuple(num_kept)

    def shared_bound_bytes(self, kept_tokens: int) -> int:
        """See `KVPool`."""
        return aligned(self.layout.full_bytes(kept_tokens))

    def own_bound_bytes(self, growth: int) -> int:
        """See `KVPool`; an extent has at least one byte."""
        return aligned(self.layout.full_bytes(max(1, growth)))

    def place(
        self,
        allocation: Extent,
        num_kept: Sequence[int],
        growth: int,
        eviction: RowLedger | None = None,
        seen: SeenRows | None = None,
        shared: SlabKV | None = None,
    ) -> SlabKV:
        """See `KVPool`: per layer the K slabs of all heads, then their V slabs."""
        layout = self.layout
        shape = (layout.num_layers, layout.num_kv_heads)
        rows = np.array(num_kept, dtype=np.int64).reshape(shape)
        capacity = np.array(capacities(num_kept, growth_of(growth, eviction)), dtype=np.int64).reshape(shape)
        both = np.stack([capacity, capacity], axis=1)
        begin = np.cumsum(both).reshape(both.shape) - both
        at = allocation.offset * layout.head_dim // layout.row_bytes + begin * layout.head_dim
        settled = eviction and eviction.settled(int(capacity.max()), self._bytes.device)
        return SlabKV(
            kept=rows if shared is None else shared.kept + rows,
            room=growth,
            eviction=settled,
            seen=seen,
            shared=shared,
            capacity=capacity,
            key_at=at[:, 0],
            value_at=at[:, 1],
        )

    def fill(self, kv: SlabKV, body: memoryview) -> None:
        """See `KVPool`."""
        parcel = np.frombuffer(body, dtype=np.uint8).reshape(-1, self.layout.row_bytes)
        for slabs, rows in self._pieces(kv, kv.kept - kv.shared_lengths):
            np.copyto(slabs, parcel[rows].reshape(slabs.shape))

    def export(self, kv: SlabKV) -> ExportedKV:
        """See `KVPool`."""
        body = self._own_body(kv)
        if kv.shared is not None:
            first, rest = kv.shared_lengths, kv.own_lengths
            body = joined(self.layout, first, self._own_body(kv.shared), rest, body)
        return ExportedKV(
            num_kept=tuple(kv.lengths.ravel().tolist()),
            body=body,
            eviction=kv.eviction_outside,
            seen=kv.seen_outside,
        )

    def keys(self, kv: SlabKV, layer: int, number: int) -> torch.Tensor:
        """See `RowAccess`."""
        head_dim, slabs = self.layout.head_dim, []
        for at, capacity in zip(kv.key_at[layer].tolist(), kv.capacity[layer].tolist(), strict=True):
            # a head with less room has fewer rows
            slab = self._elements[at : at + min(number, capacity) * head_dim].view(-1, head_dim)
            slabs.append(torch.nn.functional.pad(slab, (0, 0, 0, number - len(slab))))
        return torch.stack(slabs)

    def rows(self, kv: SlabKV, layer: int, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowAccess`."""
        places = (torch.from_numpy(begins[layer])[:, None] for begins in (kv.key_at, kv.value_at))
        keys, values = (self._elements[_elements_of(at, chosen, self.layout.head_dim)] for at in places)
        return keys, values

    def write(self, kv: SlabKV, layer: int, chosen: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `RowMemory`."""
        for begins, rows in ((kv.key_at, keys), (kv.value_at, values)):
            at = torch.from_numpy(begins[layer])[:, None]
            self._elements[_elements_of(at, chosen, self.layout.head_dim)] = rows

    def _check_memory(self) -> None:
        self._extents.check_integrity()

    def _is_allocated(self, allocation: Extent) -> bool:
        return self._extents.has(allocation)

    def _shrink(self, allocation: Extent, nbytes: int) -> Extent:
        return self._extents.shrink(allocation, nbytes)

    def _free(self, allocation: Extent) -> None:
        self._extents.free(allocation)

    @property
    def _elements(self) -> torch.Tensor:
        return self._bytes.view(TORCH_DTYPES[self.layout.dtype])

    def _allocate(self, nbytes: int) -> Extent | None:
        return self._extents.allocate(nbytes)

    def _attention(self, batch: Sequence[SlabKV]) -> SlabAttention:
        return SlabAttention(self._elements, batch, self._kernel, self.layout)

    def _move(self, kv: SlabKV, move: Move) -> None:
        pool = self._elements
        for begins in (kv.key_at, kv.value_at):
            at = torch.from_numpy(begins).flatten()[move.heads]
            source, target = (_elements_of(at, rows, self.layout.head_dim) for rows in (move.source, move.target))
            pool[target] = pool[source]

    def _own_body(self, kv: SlabKV) -> memoryview:
        """The rows in its own slabs, as a parcel body."""
        lengths = kv.own_lengths
        parcel = np.empty((2 * int(lengths.sum()), self.layout.row_bytes), dtype=np.uint8)
        for slabs, rows in self._pieces(kv, lengths):
            np.copyto(parcel[rows].reshape(slabs.shape), slabs)
        return parcel.reshape(-1).data

    def _pieces(self, kv: SlabKV, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
        """The first `lengths` rows of each slab, beside their rows in a parcel body."""
        row = 0
        for layer in range(self.layout.num_layers):
            for begins in (kv.key_at[layer], kv.value_at[layer]):
                for head, heads, length, capacity in _runs(lengths[layer], kv.capacity[layer]):
                    yield self._slabs(int(begins[head]), heads, capacity)[:, :length], slice(row, row + heads * length)
                    row += heads * length

    def _slabs(self, begin: int, heads: int, capacity: int) -> np.ndarray:
        """Neighbouring slabs as bytes, [heads, capacity, row_bytes]; `begin` counts elements."""
        row_bytes = self.layout.row_bytes
        start = begin * row_bytes // self.layout.head_dim
        return self._bytes.numpy()[start : start + heads * capacity * row_bytes].reshape(heads, capacity, row_bytes)


class SlabAttention:
    """The `LayerHook` of one step over slabs.

    Args:
        pool: The pool's memory, [elements] of its dtype.
        batch: One entry per query.
        kernel: Appends and attends.
        layout: Of the pool.
    """

    def __init__(self, pool: torch.Tensor, batch: Sequence[SlabKV], kernel: SlabKernel, layout: KVLayout) -> None:
        self._pool = pool
        self._batch = batch
        self._kernel = kernel
        self._layout = layout
        self._key_at = _by_layer([kv.key_at for kv in batch])
        self._value_at = _by_layer([kv.value_at for kv in batch])
        self._lengths = _by_layer([kv.lengths + 1 for kv in batch])
        self._shared = _shared_by_layer(batch)
        if layout.windows:
            self._leave_out_unseen()

    def part(self, members: Sequence[int]) -> SlabAttention:
        """See `StepAttention`."""
        return SlabAttention(self._pool, [self._batch[member] for member in members], self._kernel, self._layout)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """See `StepAttention`."""
        rows = self._lengths[layer] - 1
        if self._shared is not None:
            rows = rows - self._shared.lengths[layer]
        for begins, new in ((self._key_at[layer], key), (self._value_at[layer], value)):
            self._pool[_elements_of(begins, rows, new.shape[-1])] = new

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
        slabs = (self._pool, self._key_at[layer], self._value_at[layer], self._lengths[layer])
        shared = self._shared and SharedSlabs(*(places[layer] for places in self._shared))
        return self._kernel(query[:, :, 0], key[:, :, 0], value[:, :, 0], *slabs, scaling, shared)[:, None]

    def _leave_out_unseen(self) -> None:
        """Rows in sight are a slab like any other, which begins later and ends where the whole one does."""
        firsts = [kv.seen.first(kv.appended, self._layout) for kv in self._batch if kv.seen]
        assert len(firsts) == len(self._batch), "without windows a sequence of this model would see too much"
        first = _by_layer(firsts)
        self._lengths -= first
        if self._shared is not None:
            passed = torch.minimum(first, self._shared.lengths)
            self._shared = self._shared._replace(
                key_at=self._shared.key_at + passed * self._layout.head_dim,
                value_at=self._shared.value_at + passed * self._layout.head_dim,
                lengths=self._shared.lengths - passed,
            )
            first -= passed
        self._key_at += first * self._layout.head_dim
        self._value_at += first * self._layout.head_dim


def _memory(nbytes: int) -> torch.Tensor:
    """Bytes that are touched now, since a page fault costs four times the copy that it interrupts.

    Through numpy, which asks for huge pages: long reads are up to a third faster than over pages of 4 KiB.
    """
    padded = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    padded.fill(0)
    start = -padded.ctypes.data % ALIGNMENT
    return torch.from_numpy(padded[start : start + nbytes])


def _shared_by_layer(batch: Sequence[SlabKV]) -> SharedSlabs | None:
    """What others read as well, each as `_by_layer`; None where nobody shares anything."""
    if all(kv.shared is None for kv in batch):
        return None
    # where nothing is shared nothing is read, wherever it may begin
    first = [kv.shared or kv for kv in batch]
    return SharedSlabs(
        key_at=_by_layer([kv.key_at for kv in first]),
        value_at=_by_layer([kv.value_at for kv in first]),
        lengths=_by_layer([kv.shared_lengths for kv in batch]),
    )


def _by_layer(arrays: list[np.ndarray]) -> torch.Tensor:
    """[num_layers, batch, num_kv_heads] int64."""
    return torch.from_numpy(np.stack(arrays, axis=1))


def _runs(lengths: np.ndarray, capacity: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Neighbouring heads of one length and capacity: first head, number of heads, these two. Each is one copy."""
    head = 0
    for (length, room), run in groupby(zip(lengths.tolist(), capacity.tolist(), strict=True)):
        heads = len(list(run))
        yield head, heads, length, room
        head += heads


def _elements_of(begins: torch.Tensor, rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Elements of rows of slabs that begin there, broadcast against each other, and [head_dim] behind them; int64."""
    return (begins + rows * head_dim)[..., None] + torch.arange(head_dim)
