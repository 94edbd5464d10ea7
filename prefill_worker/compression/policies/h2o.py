"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): heavy hitters and recent tokens.

Idea: few tokens receive most of the attention that the prompt gives; they and the recent ones carry the answer.

    score_j = sum over all rows i of A_ij          per KV head: summed over its query heads
    keep the last `recent_share` of the budget, and the best of the rest; the same number in every layer

While tokens are generated the sums go on, and beyond the budget the token with the lowest sum goes at every step, but
for the recent ones. Own choice: the budget is then at least 16 tokens, as it is for the prompt.

The paper also evicts while it processes the prompt; here, as in its code, the whole prompt is scored first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from prefill_worker.compression.accumulated import OBSERVED, column_sums, received
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import best_tokens, share_of, with_recent
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer
from shared.kv.eviction import HeavyHitters
from shared.request.params import MIN_KEPT_TOKENS


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """See the module."""

    name: ClassVar[str] = "h2o"
    monotone: ClassVar[bool] = True
    carries_scores: ClassVar[bool] = True

    rows: str = "all"
    """`all` as published, or `probe`: an approximation by few rows."""
    recent_share: float = 0.5
    """Share of the kept tokens that goes to the most recent ones; in [0, 1]."""

    def __post_init__(self) -> None:
        self.require(self.rows in OBSERVED, f"rows must be one of {', '.join(OBSERVED)}, not {self.rows!r}")
        self.require(0 <= self.recent_share <= 1, f"recent_share must lie in [0, 1], not {self.recent_share}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """All rows, or probes."""
        return (column_sums(prompt, self.rows),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Accumulated attention."""
        return received(layer, self.rows)

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The recent tokens and the heavy hitters among the others."""
        return best_tokens(with_recent(scores, share_of(kept[0], self.recent_share)), kept)

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> HeavyHitters:
        """The budget of the prompt, which is the same in all layers."""
        budget = max(int(chosen[0].sum(dim=1).max()), MIN_KEPT_TOKENS)
        return HeavyHitters(budget=budget, recent=share_of(budget, self.recent_share))
