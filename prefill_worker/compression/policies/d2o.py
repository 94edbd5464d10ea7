"""D2O (Wan et al., ICLR 2025, arXiv 2406.13035): more for layers of even attention, and similar keys are recalled.

Idea: a layer whose attention is dense needs more tokens than one that looks at few; and of the dropped tokens those
that resemble a kept one are merged into it, the others are noise.

    score_j  = sum over all rows i of A_ij                            per KV head: summed over its query heads
    signal_l = variance over tokens of score, mean over heads; then min-max over layers
    budget_l = softmax(-signal)_l * retention * L, water-filled into [0.01, 1]
    keep the first `sinks`, the last `recent_share` of the layer's budget, and the best of the rest
    a dropped token y joins the kept x with the most similar key if their cosine reaches the threshold, which is the
    mean of these cosines over the layer's dropped tokens:  (x + sum of cos(x, y) * y) / (n + 1), value alike

While tokens are generated the sums go on, and beyond its layer's budget the token with the lowest sum goes at every
step, but for the first and the recent ones. It is merged like the prompt's, half and half, by a threshold that moves
(half old, half new mean of the heads' cosines).

Own choices: that average begins anew when the first token goes, since the prompt's dropped ones are not there any more;
a budget is then at least 16 tokens, as it is for the prompt. Deviations: the authors' code clips the shares, which
breaks the total, and leaves the first two layers and the last one whole; here the total holds. It decides by the mean
cosine over heads of the n-th dropped token of each, which are different tokens; here each head's token decides by its
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from prefill_worker.compression.accumulated import OBSERVED, column_sums, received
from prefill_worker.compression.budget import strict_budget
from prefill_worker.compression.merging import groups_of, most_similar
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import best_tokens, share_of, with_recent, with_sinks
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer
from shared.kv.eviction import Recall
from shared.request.params import MIN_KEPT_TOKENS

MAX_SINKS = 16


@dataclass(frozen=True, kw_only=True)
class D2O(Policy):
    """See the module."""

    name: ClassVar[str] = "d2o"
    carries_scores: ClassVar[bool] = True

    rows: str = "all"
    """`all` as published, or `probe`: an approximation by few rows."""
    recent_share: float = 0.5
    """Share of a layer's tokens that goes to the most recent ones; in [0, 1]."""
    sinks: int = 4
    """First tokens that always stay; in [0, 16]."""

    def __post_init__(self) -> None:
        self.require(self.rows in OBSERVED, f"rows must be one of {', '.join(OBSERVED)}, not {self.rows!r}")
        self.require(0 <= self.recent_share <= 1, f"recent_share must lie in [0, 1], not {self.recent_share}")
        self.require(0 <= self.sinks <= MAX_SINKS, f"sinks must lie in [0, {MAX_SINKS}], not {self.sinks}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """All rows, or probes."""
        return (column_sums(prompt, self.rows),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Accumulated attention."""
        return with_sinks(received(layer, self.rows), self.sinks)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """By variance, the total exact."""
        variances = [received(layer, self.rows).var(dim=1, correction=0).mean().item() for layer in layers]
        return strict_budget(shares_by_variance(variances), budget, MIN_KEPT_TOKENS)

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The recent tokens and the heavy hitters among the others."""
        return best_tokens(with_recent(scores, share_of(kept[0], self.recent_share)), kept)

    def merge(self, layer: ObservedLayer, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Dropped tokens that are similar enough join, weighted by their cosine."""
        target, cosine = most_similar(layer.key, chosen)
        groups = groups_of(chosen, target, cosine >= cosine[~chosen].mean())
        weights = groups.members(cosine.masked_fill(chosen, 1.0)[..., None])
        key, value = (
            groups.means(groups.members(whole) * weights).to(whole.dtype) for whole in (layer.key, layer.value)
        )
        return key, value

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> Recall:
        """Each layer's own budget; whatever the parameters, one row at least may go."""
        budget = [max(int(layer.sum(dim=1).max()), MIN_KEPT_TOKENS) for layer in chosen]
        sinks = min(self.sinks, min(budget) - 1)
        recent = [min(share_of(rows, self.recent_share), rows - sinks - 1) for rows in budget]
        return Recall(budget=tuple(budget), recent=tuple(recent), sinks=sinks)

    def accumulated(self, layer: ObservedLayer) -> torch.Tensor:
        """Accumulated attention, of the first tokens, too."""
        return received(layer, self.rows)


def shares_by_variance(variances: Sequence[float]) -> list[float]:
    """softmax(-signal) of each layer's variance; equal variances give equal shares."""
    signal = torch.tensor(variances, dtype=torch.float64)
    signal = signal - signal.min()
    return (-signal / signal.max().clamp(min=torch.finfo(torch.float64).tiny)).softmax(dim=0).tolist()
