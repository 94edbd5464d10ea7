"""A baseline, not a method: random tokens. What a policy gains is what it reaches above this one.

Idea: none. Whatever chooses by the prompt must beat a choice that does not look at it.

    score_j = uniform random number, per KV head; the same number of tokens in every layer

The numbers are drawn from the prompt's seed: equal prompts get equal choices. All layers share one draw, so that what
is dropped for a KV head is dropped in every layer; nothing is protected, not even the first or the last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.policy import Policy
from prefill_worker.compression.statistics import ObservedLayer


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Policy):
    """See the module."""

    name: ClassVar[str] = "random"
    monotone: ClassVar[bool] = True

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Drawn on the CPU, whose generator gives every device the same numbers."""
        generator = torch.Generator().manual_seed(layer.prompt.seed)
        return torch.rand(layer.key.shape[:2], generator=generator).to(layer.key.device)
