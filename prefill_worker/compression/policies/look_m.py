"""LOOK-M (Wan et al., Findings of EMNLP 2024, arXiv 2406.18139): text first, and dropped keys join similar ones.

Idea: a prompt's text matters more than its images, whose tokens repeat each other and can be merged.

    score_j = sum over all rows i of A_ij (+ max_j score_j for a text token)      per KV head: over its query heads
    keep a recent window of `recent_share` of the prompt, and the best of the rest; the same number in every layer
    a dropped token y joins the kept token x with the most similar key (cosine, ties: the lower position); value alike
      averaged  (x + sum of y) / (n + 1)                      n members
      pivotal   (x + sum of (x + y) / 2) / (n + 1)            the default
      weighted  (x + sum of cos(x, y) * y) / (n + 1)

Deviations: text counts within the budget (the authors' code keeps all text on top of it). The published window and as
many heavy hitters are 20 % of the prompt; own choice: below that the window takes half of what is kept at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.accumulated import OBSERVED, column_sums, received
from prefill_worker.compression.merging import Groups, groups_of, most_similar
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import best_tokens, share_of, with_recent, with_text_first
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer

MERGES = ("pivotal", "averaged", "weighted")


@dataclass(frozen=True, kw_only=True)
class LookM(Policy):
    """See the module."""

    name: ClassVar[str] = "look_m"

    rows: str = "all"
    """`all` as published, or `probe`: an approximation by few rows."""
    recent_share: float = 0.1
    """Share of the prompt that is the recent window, at most half of what is kept; in [0, 1]."""
    merging: str = "pivotal"
    """`pivotal`, `averaged` or `weighted`."""

    def __post_init__(self) -> None:
        self.require(self.rows in OBSERVED, f"rows must be one of {', '.join(OBSERVED)}, not {self.rows!r}")
        self.require(0 <= self.recent_share <= 1, f"recent_share must lie in [0, 1], not {self.recent_share}")
        self.require(self.merging in MERGES, f"merging must be one of {', '.join(MERGES)}, not {self.merging!r}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """All rows, or probes."""
        return (column_sums(prompt, self.rows),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Accumulated attention, text above vision."""
        sums = received(layer, self.rows)
        return with_text_first(sums, layer.prompt.visual.to(sums.device))

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The recent window and the best others."""
        window = min(share_of(scores.shape[1], self.recent_share), kept[0] // 2)
        return best_tokens(with_recent(scores, window), kept)

    def merge(self, layer: ObservedLayer, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every dropped token joins a kept one."""
        target, cosine = most_similar(layer.key, chosen)
        groups = groups_of(chosen, target, ~chosen)
        weights = groups.members(cosine.masked_fill(chosen, 1.0)[..., None])
        key, value = (self._merged(groups, weights, whole, chosen) for whole in (layer.key, layer.value))
        return key, value

    def _merged(self, groups: Groups, weights: torch.Tensor, whole: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        members = groups.members(whole)
        if self.merging == "weighted":
            members = members * weights
        merged = groups.means(members)
        if self.merging == "pivotal":
            # (x + sum of (x + y) / 2) / (n + 1) lies half-way between x and the average
            merged = (whole[chosen].float() + merged) / 2
        return merged.to(whole.dtype)
