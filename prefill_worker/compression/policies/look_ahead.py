"""Look-ahead (ours, after Lookahead Q-Cache, arXiv 2505.20334): an answer's first tokens show what it needs.

Idea: the question's rows guess what an answer will look at; its own first tokens show it. The prefill worker decodes
them over the full KV, which it has at hand; the client gets them at once, and the decode worker goes on after them.

    score_j = sum over the first `tokens` answer tokens i of A_ij      (per KV head: summed over its query heads)
    the most recent `recent_share` of the budget always stays; the same number of tokens in every layer

Scoring by drafted tokens is known (Lookahead Q-Cache; SpecKV); there they are thrown away. A split service has no need
to: they are the answer, no step is done twice, and what is shorter than `tokens` never crosses. Without `hand_off` they
are drafts here, too: only the selection remains, to compare it with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.policy import Policy
from prefill_worker.compression.selection import best_tokens, share_of, with_recent
from prefill_worker.compression.statistics import ObservedLayer

MAX_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class LookAheadPolicy(Policy):
    """See the module."""

    name: ClassVar[str] = "look_ahead"

    tokens: int = 8
    """Answer tokens that are fed to the full KV, in [1, 64]; each costs the prefill worker one decode step."""
    hand_off: bool = True
    """Whether the decode worker goes on after these tokens; else it decodes them again."""
    recent_share: float = 0.1
    """Share of a layer's tokens that goes to the most recent ones; in [0, 1]."""

    def __post_init__(self) -> None:
        self.require(1 <= self.tokens <= MAX_TOKENS, f"tokens must lie in [1, {MAX_TOKENS}], not {self.tokens}")
        self.require(0 <= self.recent_share <= 1, f"recent_share must lie in [0, 1], not {self.recent_share}")

    @property
    def look_ahead(self) -> int:
        """See `tokens`."""
        return self.tokens

    @property
    def keeps_look_ahead(self) -> bool:
        """See `hand_off`."""
        return self.hand_off

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Attention received from the answer's first tokens."""
        assert layer.ahead is not None, "nothing was decoded ahead"
        return layer.ahead

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The highest scores and a recent window."""
        return best_tokens(with_recent(scores, share_of(kept[0], self.recent_share)), kept)
