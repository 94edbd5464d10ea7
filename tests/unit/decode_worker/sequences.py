"""Prompts prefilled by transformers alone, and sequences that keep any part of their KV."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from decode_worker.kv_pool import HeadGroup, KVPool, SequenceKV
from decode_worker.sequence import Sequence
from shared.kv.layout import KVLayout
from shared.request.params import Sampling
from tests.unit.decode_worker.parcels import body_of, manifest_of
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


def slabs(prefilled: Prefilled, kept: Kept, growth: int) -> SequenceKV:
    """As `KVPool.install` cuts them, but in any dtype; what is undefined is NaN."""
    layers, rows = [], iter(prefilled.rows(kept))
    for heads in kept:
        pairs = [next(rows) for _ in heads]
        equal = len({len(indices) for indices in heads}) == 1
        runs = [slice(0, len(heads))] if equal else [slice(head, head + 1) for head in range(len(heads))]
        layers.append([_group(run, pairs[run], growth) for run in runs])
    return layers


def _group(heads: slice, pairs: list[tuple[torch.Tensor, torch.Tensor]], growth: int) -> HeadGroup:
    slabs = []
    for part in range(2):
        rows = torch.stack([pair[part] for pair in pairs])
        undefined = rows.new_full((len(pairs), growth, HEAD_DIM), torch.nan)
        slabs.append(torch.cat([rows, undefined], dim=1))
    return HeadGroup(heads, slabs[0], slabs[1], rows.shape[1])


def pooled(pool: KVPool, prefilled: Prefilled, kept: Kept, growth: int) -> SequenceKV:
    """Through a parcel, into the pool."""
    num_kept = [len(indices) for heads in kept for indices in heads]
    body = body_of(prefilled.rows(kept), LAYOUT)
    extent = pool.allocate(pool.sequence_bytes(tuple(num_kept), growth))
    return pool.install(extent, manifest_of(LAYOUT, num_kept, body), memoryview(body), growth)


def sequence(prefilled: Prefilled, kv: SequenceKV, growth: int, **sampling: Any) -> Sequence:
    """What joins a batch."""
    return Sequence(
        kv=kv,
        sampling=Sampling(max_new_tokens=growth + 1, ignore_eos=True, **sampling),
        eos_token_ids=frozenset(),
        last_token=prefilled.first_token,
        next_position=prefilled.num_tokens,
    )


def advance(batch: Items[Sequence], tokens: Items[int]) -> None:
    """What the scheduler does after a step."""
    for each, token in zip(batch, tokens, strict=True):
        each.accept(token)
