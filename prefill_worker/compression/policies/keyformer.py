"""Keyformer (Adnan et al., MLSys 2024, arXiv 2403.09054): heavy hitters found with noise.

Idea: what is dropped shifts the softmax of the tokens that stay; noise on the logits keeps the choice from clinging to
those that happened to collect attention early.

    score_j = sum over all rows i of softmax_j((S_ij + g_ij) / t),   g_ij Gumbel noise, t = 1 for a whole prompt
    keep the last `recent_share` of the budget, and the best of the rest; the same number in every layer

The noise comes from a hash of the prompt, so that equal prompts get equal choices; it is the same in every layer, and
differs between a CPU and a GPU. The temperature rises only with tokens that are generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.accumulated import OBSERVED, rows_that_see
from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import Rows
from prefill_worker.compression.selection import best_tokens, share_of, with_recent
from prefill_worker.compression.statistics import ObservedLayer, Statistic

# The exponential of Gumbel noise is 1 / E, E exponentially distributed; a draw of 0 would be no number.
SMALLEST_DRAW = 1e-30


@dataclass(frozen=True)
class NoisySums(Statistic[torch.Tensor]):
    """As `ColumnSums`, of rows whose logits have Gumbel noise."""

    rows: Rows

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """[num_kv_heads, num_tokens] fp32."""
        noise = torch.Generator(device=layer.key.device).manual_seed(layer.prompt.seed)
        sums = layer.key.new_zeros(layer.key.shape[:2], dtype=torch.float32)
        for _, weights in layer.blocks(self.rows):
            drawn = torch.empty_like(weights).exponential_(generator=noise)
            # softmax(S + g) is softmax(S) * exp(g), normalised
            weights = weights / drawn.clamp_(min=SMALLEST_DRAW)
            weights /= weights.sum(dim=2, keepdim=True)
            seen = weights.shape[2]
            sums[:, :seen] += weights.sum(dim=1).view(-1, layer.group, seen).sum(dim=1)
        return sums


@dataclass(frozen=True, kw_only=True)
class Keyformer(Policy):
    """See the module."""

    name: ClassVar[str] = "keyformer"
    monotone: ClassVar[bool] = True

    rows: str = "all"
    """`all` as published, or `probe`: an approximation by few rows."""
    recent_share: float = 0.3
    """Share of the kept tokens that goes to the most recent ones; in [0, 1]."""

    def __post_init__(self) -> None:
        self.require(self.rows in OBSERVED, f"rows must be one of {', '.join(OBSERVED)}, not {self.rows!r}")
        self.require(0 <= self.recent_share <= 1, f"recent_share must lie in [0, 1], not {self.recent_share}")

    def needs(self, prompt: PromptShape) -> tuple[NoisySums]:
        """All rows, or probes."""
        return (NoisySums(OBSERVED[self.rows](prompt)),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Accumulated noisy attention."""
        (statistic,) = self.needs(layer.prompt)
        sums = layer[statistic]
        return sums if self.rows == "all" else sums / rows_that_see(statistic.rows, sums)

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The recent tokens and the best others."""
        return best_tokens(with_recent(scores, share_of(kept[0], self.recent_share)), kept)
