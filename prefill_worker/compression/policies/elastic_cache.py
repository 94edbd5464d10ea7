"""Elastic Cache (Liu et al., ECCV 2024, arXiv 2407.18121): the important tokens are anchors, the others join them.

Idea: what is not important enough to stay need not be lost: it merges into the nearest token that stays.

    score_j = sum over all rows i and heads of A_ij                     one selection for all heads of a layer
    keep the first `start`, the last one, and the best of the rest (anchors); the same number in every layer
    anchor  = mean of itself and the dropped tokens that are nearest to it by position (ties: the lower anchor)

While tokens are generated, the token in one fixed place goes (25 before the end of what was kept of the prompt, or its
middle) whenever the cache holds more than its share of all tokens seen so far.

The first and the last tokens take no members. Keys are merged as they are cached, each rotated to its own position:
the paper accepts that. Own choice: in a budget of visual tokens the text that always stays counts among the anchors.

Sums over all rows favour early tokens, which more rows see, and there is no recent window: the end of a prompt, where
questions stand, is merged away. The authors' code takes argsort for a rank, and so keeps tokens regardless of score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from prefill_worker.compression.accumulated import OBSERVED, column_sums, received
from prefill_worker.compression.merging import groups_of, nearest
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import with_sinks
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer
from shared.kv.eviction import FixedSlot, share_that_travels
from shared.request.params import MIN_KEPT_TOKENS

# So that every budget leaves an anchor beside the first tokens and the last one.
MAX_START = MIN_KEPT_TOKENS - 2
# Of the place where generated tokens push others out, from the end of the kept prompt.
DISTANCE = -25


@dataclass(frozen=True, kw_only=True)
class ElasticCache(Policy):
    """See the module."""

    name: ClassVar[str] = "elastic_cache"

    rows: str = "all"
    """`all` as published, or `probe`: an approximation by few rows."""
    start: int = 4
    """First tokens that always stay, unmerged; in [0, 14]."""

    def __post_init__(self) -> None:
        self.require(self.rows in OBSERVED, f"rows must be one of {', '.join(OBSERVED)}, not {self.rows!r}")
        self.require(0 <= self.start <= MAX_START, f"start must lie in [0, {MAX_START}], not {self.start}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """All rows, or probes."""
        return (column_sums(prompt, self.rows),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Accumulated attention of all heads together."""
        sums = received(layer, self.rows)
        scores = with_sinks(sums.sum(dim=0, keepdim=True).expand_as(sums), self.start)
        scores[:, -1] = torch.inf
        return scores

    def merge(self, layer: ObservedLayer, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain means by anchor."""
        anchors = chosen.clone()
        anchors[:, : self.start] = False
        anchors[:, -1] = False
        groups = groups_of(chosen, *nearest(anchors))
        key, value = (groups.means(groups.members(whole)).to(whole.dtype) for whole in (layer.key, layer.value))
        return key, value

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> FixedSlot:
        """The same place and share in every layer."""
        return FixedSlot(retention=(share_that_travels(retention),) * len(chosen), distance=DISTANCE)
