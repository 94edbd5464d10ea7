"""TidalDecode (Yang et al., ICLR 2025, arXiv 2410.05076): everything is kept, but most layers read little of it.

Idea: the tokens that one layer attends to most are those that the layers after it need.

    layers before `first`                    read everything
    layers `first` and `second`              read everything, and select the `top` tokens of each KV head
    all others                               read the tokens that the last selection before them named

It saves reads of a decode step, not memory and not transfer: ask for it with a retention of 1, where the whole prompt
is shipped. A selection must mean the same tokens in all layers and heads, so a smaller budget keeps the first
`sinks` tokens and the last ones, alike everywhere (own choice). Own choices, too: query heads that share a KV head
select together by the sum of their attention, and the newest token is always read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from prefill_worker.compression.policies.streaming_llm import MAX_SINKS, StreamingLLM
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import ObservedLayer
from shared.kv.eviction import MAX_TOKENS, SparseRead


@dataclass(frozen=True, kw_only=True)
class TidalDecode(Policy):
    """See the module."""

    name: ClassVar[str] = "tidal_decode"
    monotone: ClassVar[bool] = True

    first: int = 2
    """Layer that selects first, counted from 0."""
    second: int = 9
    """Layer that selects anew, after `first`; without effect in a model that has no such layer."""
    top: int = 256
    """Tokens that are read after a selection, per layer and KV head."""
    sinks: int = 4
    """First tokens that a budget below 1 keeps; in [0, 16]."""

    def __post_init__(self) -> None:
        ordered = 0 <= self.first < self.second
        self.require(ordered, f"first and second must ascend from 0, not {self.first} and {self.second}")
        self.require(1 <= self.top <= MAX_TOKENS, f"top must be at least 1, not {self.top}")
        self.require(0 <= self.sinks <= MAX_SINKS, f"sinks must lie in [0, {MAX_SINKS}], not {self.sinks}")

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """StreamingLLM's: alike in all layers and heads."""
        return StreamingLLM(sinks=self.sinks).score(layer)

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> SparseRead | None:
        """Which layers read what; nothing goes."""
        layers = tuple(layer for layer in (self.first, self.second) if layer < len(chosen))
        return SparseRead(select_layers=layers, top=self.top) if layers else None
