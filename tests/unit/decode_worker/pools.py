"""Pools of both storages, and what a sequence in them must be: plain lists of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from decode_worker.kv_pool.base import ExportedKV, KVPool, SequenceKV
from decode_worker.kv_pool.blocks import BlockPool
from decode_worker.kv_pool.slabs import SlabPool
from shared.kernels.dispatch import REFERENCE, Kernels
from shared.kv.layout import KVLayout
from shared.model.spec import TORCH_DTYPES
from tests.unit.decode_worker.parcels import body_of

CPU = torch.device("cpu")
GROUP = 2
SCALING = 0.4
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
Pool = KVPool[Any, Any]


def slab_pool(layout: KVLayout, capacity: int = 1 << 18) -> SlabPool:
    return SlabPool(capacity, layout)


def block_pool(
    layout: KVLayout,
    capacity: int = 1 << 18,
    *,
    block_size: int = 16,
    max_num_seqs: int = 8,
    max_tokens: int = 256,
    device: torch.device = CPU,
    kernels: Kernels = REFERENCE,
) -> BlockPool:
    return BlockPool(
        capacity,
        layout,
        device=device,
        kernels=kernels,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_tokens=max_tokens,
    )


POOLS: dict[str, Callable[[KVLayout, int], Pool]] = {
    "slabs": slab_pool,
    "blocks of 16": block_pool,
    "blocks of 3": lambda layout, capacity: block_pool(layout, capacity, block_size=3),
    "blocks of 1": lambda layout, capacity: block_pool(layout, capacity, block_size=1),
}


def memory(pool: Pool) -> list[torch.Tensor]:
    """Everything that holds KV, as bytes; one row per piece that can be allocated."""
    if isinstance(pool, SlabPool):
        return [pool._bytes[:, None]]
    assert isinstance(pool, BlockPool)
    return [blocks.view(torch.uint8).flatten(1) for blocks in (pool.key_blocks, pool.value_blocks)]


def places(allocation: Any) -> Any:
    """Which rows of `memory` an allocation is."""
    return slice(allocation.offset, allocation.end) if hasattr(allocation, "offset") else allocation.blocks


def poison(pool: Pool, allocation: Any = None) -> None:
    """NaN, in any dtype: an allocation, or the whole pool."""
    for rows in memory(pool):
        rows[slice(None) if allocation is None else places(allocation)] = 0xFF


class Rows:
    """One sequence: K and V rows of each layer and KV head, [tokens, head_dim]."""

    def __init__(self, layout: KVLayout, num_kept: Sequence[int], seed: int) -> None:
        self.layout, self._generator = layout, torch.Generator().manual_seed(seed)
        self.pairs = [(self._draw(kept), self._draw(kept)) for kept in num_kept]

    def _draw(self, *shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, self.layout.head_dim, generator=self._generator)
        return drawn.to(TORCH_DTYPES[self.layout.dtype])

    @property
    def num_kept(self) -> tuple[int, ...]:
        return tuple(len(key) for key, _ in self.pairs)

    @property
    def body(self) -> memoryview:
        """As a parcel; nobody may write to it."""
        return memoryview(body_of(self.pairs, self.layout)).toreadonly()

    def token(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [num_query_heads, 1, head_dim] and K, V [num_kv_heads, 1, head_dim] of a new token."""
        heads = self.layout.num_kv_heads
        return self._draw(GROUP * heads, 1), self._draw(heads, 1), self._draw(heads, 1)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for head in range(self.layout.num_kv_heads):
            index = layer * self.layout.num_kv_heads + head
            keys, values = self.pairs[index]
            self.pairs[index] = torch.cat([keys, key[head]]), torch.cat([values, value[head]])

    def attend(self, layer: int, query: torch.Tensor) -> np.ndarray:
        """[num_query_heads, head_dim] in double precision."""
        out = []
        for head, row in enumerate(query[:, 0].double()):
            keys, values = self.pairs[layer * self.layout.num_kv_heads + head // GROUP]
            out.append((keys.double() @ row * SCALING).softmax(dim=0) @ values.double())
        return torch.stack(out).numpy()

    def check(self, exported: ExportedKV) -> None:
        """Bit by bit."""
        assert exported.num_kept == self.num_kept
        assert bytes(exported.body) == bytes(self.body)


def install(pool: Pool, rows: Rows, growth: int) -> tuple[Any, SequenceKV]:
    """Into memory of exactly the size that is needed."""
    allocation = pool.allocate(pool.sequence_bytes(rows.num_kept, growth))
    return allocation, pool.install(allocation, rows.num_kept, rows.body, growth)


def step(pool: Pool, batch: Sequence[tuple[Rows, SequenceKV]]) -> list[torch.Tensor]:
    """One token for each sequence; compares attention with its definition. Returns its output per layer."""
    layout, outputs = pool.layout, []
    attention = pool.attention([kv for _, kv in batch])
    for layer in range(layout.num_layers):
        query, key, value = (torch.stack(parts) for parts in zip(*[rows.token() for rows, _ in batch], strict=True))
        outputs.append(attention.attend(layer, query, key, value, None, SCALING))
        assert outputs[-1].shape == (len(batch), 1, GROUP * layout.num_kv_heads, layout.head_dim)
        for number, (rows, _) in enumerate(batch):
            rows.append(layer, key[number], value[number])
            found, tolerance = outputs[-1][number, 0].double().numpy(), TOLERANCE[layout.dtype]
            np.testing.assert_allclose(found, rows.attend(layer, query[number]), rtol=tolerance, atol=tolerance)
    for _, kv in batch:
        kv.appended += 1
    return outputs
