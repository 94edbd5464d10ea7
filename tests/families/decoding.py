"""Prompts that transformers itself has computed, and the decode side's batches over any part of their KV."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from decode_worker.kv_pool.seen_rows import SeenRows
from decode_worker.kv_pool.slabs import SlabAttention, SlabKV
from decode_worker.sequence import Sequence
from shared.kernels.reference.slab_attention import slab_attention
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest
from shared.model.sampler import Sampler
from shared.request.sampling import Sampling
from tests.families.loaded import Loaded
from tests.unit.decode_worker.parcels import body_of, manifest_of
from tests.unit.decode_worker.pools import Pool
from tests.unit.decode_worker.sighted import Tokens, bitmaps


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A prompt after transformers' own pass.

    Attributes:
        cache: The full KV of every layer, windows or not.
        next_position: RoPE position of the first generated token.
    """

    cache: DynamicCache
    first_token: int
    num_tokens: int
    next_position: int

    def rows(self, kept: Tokens, layout: KVLayout) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(K, V) of some tokens, layer-major per KV head."""
        heads, layers = layout.num_kv_heads, self.cache.layers
        return [
            (
                layers[index // heads].keys[0, index % heads, tokens],
                layers[index // heads].values[0, index % heads, tokens],
            )
            for index, tokens in enumerate(kept)
        ]

    def manifest(self, kept: Tokens, layout: KVLayout, body: bytearray) -> Manifest:
        made = manifest_of(
            layout,
            [len(tokens) for tokens in kept],
            body,
            logical_length=self.num_tokens,
            next_position=self.next_position,
            generated=(self.first_token,),
            seen_tokens=bitmaps(layout, self.num_tokens, kept),
        )
        made.check()
        return made

    def sequence(self, kv: Any, growth: int) -> Sequence:
        return Sequence(
            kv=kv,
            sampler=Sampler(Sampling(max_new_tokens=growth + 1, ignore_eos=True), frozenset()),
            last_token=self.first_token,
            next_position=self.next_position,
        )


@torch.inference_mode()
def compute(model: Any, inputs: dict[str, Any], **options: Any) -> Computed:
    cache, num_tokens, delta = DynamicCache(), inputs["input_ids"].shape[1], 0
    if hasattr(model.model, "get_rope_index"):
        names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
        known = {name: inputs[name] for name in names if name in inputs}
        delta = int(model.model.get_rope_index(inputs["input_ids"], **known)[1])
    logits = model(**inputs, past_key_values=cache, use_cache=True, **options).logits[0, -1]
    return Computed(
        cache=cache, first_token=int(logits.argmax()), num_tokens=num_tokens, next_position=num_tokens + delta
    )


def short_text(loaded: Loaded, tokens: int) -> dict[str, Any]:
    """A prompt of few tokens, without a chat's template."""
    encoded = loaded.processor.tokenizer("What is in the image?", add_special_tokens=False, return_tensors="pt")
    inputs = {"input_ids": encoded["input_ids"][:, :tokens], "attention_mask": encoded["attention_mask"][:, :tokens]}
    if hasattr(loaded.model.model, "get_rope_index"):
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def pooled(pool: Pool, computed: Computed, kept: Tokens, growth: int) -> Sequence:
    """Through a parcel into the pool, for ever."""
    body = body_of(computed.rows(kept, pool.layout), pool.layout)
    manifest = computed.manifest(kept, pool.layout, body)
    allocation = pool.allocate(pool.sequence_bytes(manifest.num_kept, growth))
    kv = pool.install(allocation, manifest.num_kept, memoryview(body), growth, None, SeenRows.of(manifest))
    return computed.sequence(kv, growth)


class DoubleSlabs:
    """Slabs in double precision, which no layout has; what is undefined is NaN."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._memory = torch.empty(0, dtype=torch.float64)

    def sequence(self, computed: Computed, kept: Tokens, growth: int) -> Sequence:
        """Keeps some of a prompt."""
        layout, begins, at = self._layout, [], self._memory.numel()
        pieces = [self._memory]
        for pair in computed.rows(kept, layout):
            for rows in pair:
                begins.append(at)
                pieces += [rows.flatten(), rows.new_full((growth * layout.head_dim,), torch.nan)]
                at += rows.numel() + growth * layout.head_dim
        self._memory = torch.cat(pieces)
        shape = (layout.num_layers, layout.num_kv_heads)
        places = np.array(begins).reshape(*shape, 2)
        counts = np.array([len(tokens) for tokens in kept]).reshape(shape)
        body = bytearray(layout.body_bytes([len(tokens) for tokens in kept]))
        kv = SlabKV(
            kept=counts,
            room=growth,
            seen=SeenRows.of(computed.manifest(kept, layout, body)),
            capacity=counts + growth,
            key_at=places[..., 0],
            value_at=places[..., 1],
        )
        return computed.sequence(kv, growth)

    def attention(self, batch: Items[SlabKV]) -> SlabAttention:
        """See `KVPool`."""
        return SlabAttention(self._memory, batch, slab_attention, self._layout)

    def complete(self, batch: Items[SlabKV]) -> None:
        """See `KVPool`."""
        for kv in batch:
            kv.appended += 1
