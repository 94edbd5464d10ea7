"""Sequences whose KV is random, in the decode worker's own pools: a step over them costs what it always costs."""

from __future__ import annotations

from collections.abc import Sequence as Many
from fractions import Fraction
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.random_llama import ModelConfig
from decode_worker.engine import DecodeEngine, EagerEngine
from decode_worker.eviction.ledger import RowLedger
from decode_worker.graph_engine import GraphEngine
from decode_worker.kv_pool.base import Allocation, KVPool
from decode_worker.kv_pool.blocks import BlockAllocation, BlockPool
from decode_worker.kv_pool.seen_rows import SeenRows
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.kv_pool.slot_tables import BlockKV
from decode_worker.sequence import Sequence
from prefill_worker.compression.budget import round_to_total
from shared.kernels.dispatch import kernels_for
from shared.kv.extents import aligned
from shared.kv.layout import ITEM_BYTES, KVLayout
from shared.model.sampler import Sampler
from shared.request.sampling import Sampling

# Kept lengths of layers differ by this factor around their mean, as sparsity budgets make them.
SPREAD = (0.5, 1.5)


class RandomBlockPool(BlockPool):
    """Blocks that are random from the start; installing a sequence deals it blocks and copies nothing.

    Parcels of many long prompts would pass through the host for minutes and not fit into its memory.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.key_blocks.normal_()
        self.value_blocks.normal_()

    def install(
        self,
        allocation: BlockAllocation,
        num_kept: Many[int],
        body: memoryview,
        growth: int,
        eviction: RowLedger | None = None,
        seen: SeenRows | None = None,
        shared: BlockKV | None = None,
    ) -> BlockKV:
        """See the class."""
        return self.place(allocation, num_kept, growth, eviction, seen, shared)


def build_pool(
    config: ModelConfig, capacity: int, *, max_num_seqs: int, max_tokens: int, random: bool = True
) -> KVPool[Any, Any]:
    """The storage that the decode worker would choose, on the same device.

    Args:
        config: The model.
        capacity: Bytes.
        max_num_seqs: Sequences in one step at most.
        max_tokens: Context of the model.
        random: Whether installed sequences will be random anyway, so that a GPU's pool need not copy them.
    """
    if not config.on_gpu:
        return SlabPool(capacity, config.layout)
    pool = RandomBlockPool if random else BlockPool
    return pool(
        capacity,
        config.layout,
        device=config.torch_device,
        kernels=kernels_for(config.torch_device),
        block_size=config.block_size,
        max_num_seqs=max_num_seqs,
        max_tokens=max_tokens,
    )


def build_engine(model: PreTrainedModel, pool: KVPool[Any, Any], *, max_num_seqs: int) -> DecodeEngine:
    """The steps that the decode worker would run over such a pool."""
    if isinstance(pool, BlockPool):
        return GraphEngine(model, pool, max_num_seqs=max_num_seqs)
    return EagerEngine(model, pool)


def pool_bytes(config: ModelConfig, num_kept: Many[int], growth: int, sequences: int) -> int:
    """Capacity for exactly that many equal sequences."""
    unit, layout = config.block_size if config.on_gpu else 1, config.layout
    rows = [-(-(kept + growth) // unit) * unit for kept in num_kept]
    trash_block = 2 * unit * layout.row_bytes
    return sequences * aligned(layout.body_bytes(rows)) + trash_block


def random_body(config: ModelConfig, tokens: int) -> memoryview:
    """A parcel body of at most `tokens` tokens per layer and head, to be cut to size; empty where none is copied."""
    if config.on_gpu:
        return memoryview(b"")
    elements = config.layout.full_bytes(tokens) // ITEM_BYTES[config.layout.dtype]
    return torch.randn(elements, dtype=config.torch_dtype).view(torch.uint8).numpy().data


def install(
    pool: KVPool[Any, Any],
    allocation: Allocation,
    num_kept: Many[int],
    body: memoryview,
    *,
    position: int,
    growth: int,
) -> Sequence:
    """A sequence that is ready to step `growth` times and stops by itself no sooner.

    Args:
        pool: Where it goes.
        allocation: At least `sequence_bytes(num_kept, growth)`.
        num_kept: Layer-major, one count per layer and KV head.
        body: From `random_body`.
        position: Of its next token.
        growth: Tokens to come.
    """
    parcel = body[: pool.layout.body_bytes(num_kept)]
    return Sequence(
        kv=pool.install(allocation, num_kept, parcel, growth),
        sampler=Sampler(Sampling(max_new_tokens=growth + 1), frozenset()),
        last_token=1,
        next_position=position,
    )


def ragged(layout: KVLayout, prompt: int, mean: Fraction, chance: Random) -> tuple[int, ...]:
    """Kept counts, one per layer and KV head: random over the layers with exactly that mean, equal in a layer."""
    draws = [chance.uniform(*SPREAD) for _ in range(layout.num_layers)]
    total = int(mean * layout.num_layers)
    kept = round_to_total([total * draw / sum(draws) for draw in draws], total, prompt)
    return even(layout, [max(1, count) for count in kept])


def even(layout: KVLayout, kept_per_layer: Many[int]) -> tuple[int, ...]:
    """The same count for all KV heads of a layer."""
    return tuple(kept for kept in kept_per_layer for _ in range(layout.num_kv_heads))
