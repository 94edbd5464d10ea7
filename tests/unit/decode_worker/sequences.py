"""Prompts prefilled by transformers alone, and sequences that keep any part of their KV."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from decode_worker.kv_pool.base import KVPool, SequenceKV
from decode_worker.kv_pool.slabs import SlabAttention, SlabKV
from decode_worker.sequence import Sequence
from shared.kernels.reference.slab_attention import slab_attention
from shared.kv.layout import KVLayout
from shared.model.sampler import Drawn, Sampler
from shared.request.sampling import Sampling
from tests.unit.decode_worker.parcels import body_of
from tests.unit.decode_worker.tiny import HEAD_DIM, KV_HEADS, LAYERS, tokenizer

LAYOUT = KVLayout(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32")
# per layer and KV head, the positions that are kept
Kept = list[list[list[int]]]


@dataclass
class Prefilled:
    """A prompt after a full-attention pass; keys and values per layer, [num_kv_heads, num_tokens, head_dim]."""

    cache: DynamicCache
    logits: torch.Tensor
    num_tokens: int

    @property
    def first_token(self) -> int:
        return int(self.logits.argmax())

    def rows(self, kept: Kept) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(K, V) of what is kept, layer-major per KV head."""
        return [
            (self.cache.layers[layer].keys[0][head][indices], self.cache.layers[layer].values[0][head][indices])
            for layer, heads in enumerate(kept)
            for head, indices in enumerate(heads)
        ]


@torch.inference_mode()
def prefill(whole: Any, input_ids: list[int], **inputs: torch.Tensor) -> Prefilled:
    cache = DynamicCache()
    output = whole(input_ids=torch.tensor([input_ids]), past_key_values=cache, use_cache=True, **inputs)
    return Prefilled(cache=cache, logits=output.logits[0, -1], num_tokens=len(input_ids))


def text_ids(seed: int, length: int) -> list[int]:
    """Tokens that are no special ones."""
    return [random.Random(seed).randrange(10, len(tokenizer())) for _ in range(length)]


def everything(num_tokens: int) -> Kept:
    return [[[*range(num_tokens)] for _ in range(KV_HEADS)] for _ in range(LAYERS)]


def some(seed: int, num_tokens: int, *, ragged: bool = True) -> Kept:
    """Different positions in every layer and KV head; `ragged` counts differ, too."""
    draw = random.Random(seed)
    counts = [[draw.randint(1, num_tokens) for _ in range(KV_HEADS)] for _ in range(LAYERS)]
    if not ragged:
        counts = [[heads[0]] * KV_HEADS for heads in counts]
    return [[sorted(draw.sample(range(num_tokens), count)) for count in heads] for heads in counts]


class DoublePool:
    """Slabs in double precision, which no layout has; what is undefined is NaN."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float64)

    def install(self, prefilled: Prefilled, kept: Kept, growth: int) -> SlabKV:
        """Keeps some of a prompt."""
        begins, pieces, at = [], [self._memory], self._memory.numel()
        for pair in prefilled.rows(kept):
            for rows in pair:
                begins.append(at)
                pieces += [rows.flatten(), rows.new_full((growth * HEAD_DIM,), torch.nan)]
                at += rows.numel() + growth * HEAD_DIM
        self._memory = torch.cat(pieces)
        places = np.array(begins).reshape(LAYERS, KV_HEADS, 2)
        counts = np.array([[len(indices) for indices in heads] for heads in kept])
        return SlabKV(
            kept=counts, room=growth, capacity=counts + growth, key_at=places[..., 0], value_at=places[..., 1]
        )

    def attention(self, batch: Items[SlabKV]) -> SlabAttention:
        """See `KVPool`."""
        return SlabAttention(self._memory, batch, slab_attention, LAYOUT)

    def complete(self, batch: Items[SlabKV]) -> None:
        """See `KVPool`."""
        for kv in batch:
            kv.appended += 1


def pooled(pool: KVPool[Any, Any], prefilled: Prefilled, kept: Kept, growth: int) -> SequenceKV:
    """Through a parcel, into the pool, for ever."""
    return placed(pool, prefilled, kept, growth)[1]


def placed(pool: KVPool[Any, Any], prefilled: Prefilled, kept: Kept, growth: int) -> tuple[Any, SequenceKV]:
    """Through a parcel, into an allocation of the pool."""
    num_kept = [len(indices) for heads in kept for indices in heads]
    body = body_of(prefilled.rows(kept), LAYOUT)
    allocation = pool.allocate(pool.sequence_bytes(tuple(num_kept), growth))
    return allocation, pool.install(allocation, num_kept, memoryview(body), growth)


def sequence(prefilled: Prefilled, kv: SequenceKV, growth: int, **sampling: Any) -> Sequence:
    """What joins a batch."""
    return Sequence(
        kv=kv,
        sampler=Sampler(Sampling(max_new_tokens=growth + 1, ignore_eos=True, **sampling), frozenset()),
        last_token=prefilled.first_token,
        next_position=prefilled.num_tokens,
    )


def advance(batch: Items[Sequence], drawn: Items[Drawn]) -> None:
    """What the scheduler does after a step."""
    for each, token in zip(batch, drawn, strict=True):
        each.accept(token)
