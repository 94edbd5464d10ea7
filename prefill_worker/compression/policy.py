"""What a compression policy is: which rows it observes, and how it scores, allocates and selects.

Stages: observe -> score -> allocate -> select. The pipeline (`pipeline.py`) runs them; a policy is one short file
that overrides what is its own. retention = 1 bypasses every policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch


@dataclass(frozen=True, kw_only=True)
class PromptShape:
    """Where things lie in a prompt of `num_tokens`; `last_visual` is the index of the last visual token or None."""

    num_tokens: int
    num_visual: int
    last_visual: int | None


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What was observed of one layer's attention in the rows that the policy asked for.

    Attributes:
        column_mass: [num_kv_heads, num_tokens] fp32, attention received per key, summed over rows and group.
        kept_entries: [num_query_heads] int64, entries above the policy's threshold.
        causal_entries: Entries under the causal mask in the observed rows, per query head.
        row_mass: Sum of column_mass of one KV head: rows times group size.
    """

    column_mass: torch.Tensor
    kept_entries: torch.Tensor
    causal_entries: int
    row_mass: float

    def sparsity(self) -> float:
        """Share of causal entries below the threshold, mean over query heads (gamma')."""
        kept = self.kept_entries.double().mean().item()
        return 1.0 - kept / self.causal_entries


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """The budget of one prompt: `retention` of `num_tokens` in each of `num_layers`, exactly as asked."""

    retention: Fraction
    num_tokens: int
    num_layers: int

    @property
    def total(self) -> int:
        """Tokens of all layers together; rounded down, so bytes never exceed the target."""
        return int(self.retention * self.num_layers * self.num_tokens)


class Policy(ABC):
    """A compression policy; a frozen dataclass whose fields are its request parameters."""

    name: ClassVar[str]
    threshold: float

    @abstractmethod
    def rows(self, prompt: PromptShape) -> range:
        """Positions of the rows whose attention is observed; they end with the prompt."""

    @abstractmethod
    def score(self, layer: LayerStatistics) -> torch.Tensor:
        """Worth of each token, [num_kv_heads, num_tokens] fp32."""

    @abstractmethod
    def allocate(self, layers: Sequence[LayerStatistics], budget: TokenBudget) -> list[int]:
        """Tokens to keep in each layer, each between 1 and num_tokens."""

    @abstractmethod
    def select(self, scores: torch.Tensor, kept: int) -> torch.Tensor:
        """Indices of `kept` tokens per KV head, [num_kv_heads, kept] int64, ascending; deterministic."""
