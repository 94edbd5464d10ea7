"""Sizes of language models: all that decides the bytes and the time of a step when the weights are random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ShapeName = Literal["llava-1.5-7b", "llava-1.6-mistral-7b", "qwen2.5-vl-7b"]


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The language model of a VLM.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the gated MLP.
        layers: Layers.
        query_heads: Query heads.
        kv_heads: KV heads.
        head_dim: Dimensions of a head.
        vocabulary: Rows of the embedding and of the output layer, which share nothing.
    """

    hidden: int
    intermediate: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SHAPES: dict[ShapeName, TextShape] = {
    # Vicuna 7B: every query head has its own KV head
    "llava-1.5-7b": TextShape(
        hidden=4096, intermediate=11008, layers=32, query_heads=32, kv_heads=32, head_dim=128, vocabulary=32064
    ),
    "llava-1.6-mistral-7b": TextShape(
        hidden=4096, intermediate=14336, layers=32, query_heads=32, kv_heads=8, head_dim=128, vocabulary=32064
    ),
    "qwen2.5-vl-7b": TextShape(
        hidden=3584, intermediate=18944, layers=28, query_heads=28, kv_heads=4, head_dim=128, vocabulary=152064
    ),
}
"""From the published configurations; biases are left out."""
