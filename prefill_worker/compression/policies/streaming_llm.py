"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): the first tokens and the last ones, whatever they say.

Idea: attention collects on the first tokens (sinks) and on the recent ones; without the sinks a window collapses.

    keep the first `sinks` and the last k - `sinks` tokens

A variant: the paper re-assigns positions inside its cache at each step, here every token keeps its original position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.policy import Policy
from prefill_worker.compression.selection import with_sinks
from prefill_worker.compression.statistics import ObservedLayer

MAX_SINKS = 16


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """See the module."""

    name: ClassVar[str] = "streaming_llm"
    monotone: ClassVar[bool] = True

    sinks: int = 4
    """First tokens that always stay; in [0, 16]."""

    def __post_init__(self) -> None:
        self.require(0 <= self.sinks <= MAX_SINKS, f"sinks must lie in [0, {MAX_SINKS}], not {self.sinks}")

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """The later, the better."""
        recency = torch.arange(layer.prompt.num_tokens, dtype=torch.float32, device=layer.key.device)
        return with_sinks(recency.expand(len(layer.key), -1), self.sinks)
