"""VL-Cache (Tu et al., ICLR 2025, arXiv 2410.23317), the default: what follows the image says what matters in it.

Idea: in a vision-language prompt the attention of the tokens after the image says both which tokens matter and how
many of them each layer needs.

    score_j   = sum over post-vision rows i of A_ij                 (summed over all query heads)
    sparsity  = share of causal entries with A_ij < threshold * max_j A_ij, mean over query heads
    budget_l  = clip((1 - sparsity_l) / sum(1 - sparsity) * retention * L, 0.01, 1)

The paper leaves open how heads that share KV select. All KV heads of a layer select together here, which on the bundled
model keeps far more answers right than each by itself, the paper read to the letter for heads of their own
(`shared_heads=false`). The paper's clip breaks the total (`paper`); `strict` scales the shares until their mean is the
retention exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.budget import (
    paper_budget,
    paper_lower_bounds,
    strict_bounds,
    strict_budget,
    strict_lower_bounds,
    uniform_budget,
)
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import MAX_ROWS, post_vision_rows
from prefill_worker.compression.selection import best_tokens, share_of, with_recent
from prefill_worker.compression.statistics import ObservedLayer, Sweep
from shared.request.params import MIN_KEPT_TOKENS

BUDGETS = {"strict": strict_budget, "paper": paper_budget, "uniform": uniform_budget}
# Of `paper`, whose shares are in proportion, and rounded down, the budget of the first layers bounds itself.
BOUNDS = {"strict": strict_bounds, "paper": paper_budget, "uniform": uniform_budget}
LOWER_BOUNDS = {"strict": strict_lower_bounds, "paper": paper_lower_bounds, "uniform": uniform_budget}


@dataclass(frozen=True, kw_only=True)
class VLCache(Policy):
    """See the module."""

    name: ClassVar[str] = "vl_cache"
    monotone: ClassVar[bool] = True

    budget: str = "strict"
    """How layers share: `strict` (exact total), `paper`, or `uniform` (the same in each, for comparison)."""
    threshold: float = 0.01
    """p: an attention entry below p times its row's maximum counts as zero; in (0, 1]."""
    max_rows: int = MAX_ROWS
    """Post-vision rows observed at most, the last ones; 0 = all."""
    recent_share: float = 0.1
    """Share of a layer's tokens that goes to the most recent ones; in [0, 1]."""
    min_tokens: int = MIN_KEPT_TOKENS
    """Fewest tokens of a layer."""
    shared_heads: bool = True
    """One selection for all KV heads of a layer; else one per KV head, by the sums over its query heads."""

    def __post_init__(self) -> None:
        self.require(self.budget in BUDGETS, f"budget must be one of {', '.join(BUDGETS)}, not {self.budget!r}")
        self.require(0 < self.threshold <= 1, f"threshold must lie in (0, 1], not {self.threshold}")
        self.require(self.max_rows >= 0, f"max_rows must not be negative, not {self.max_rows}")
        self.require(0 <= self.recent_share <= 1, f"recent_share must lie in [0, 1], not {self.recent_share}")
        allowed = 1 <= self.min_tokens <= MIN_KEPT_TOKENS
        self.require(allowed, f"min_tokens must lie in [1, {MIN_KEPT_TOKENS}], not {self.min_tokens}")

    def needs(self, prompt: PromptShape) -> tuple[Sweep]:
        """Post-vision rows, capped."""
        return (self._sweep(prompt),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Attention received, per KV head or shared."""
        sums = layer[self._sweep(layer.prompt)].column_sums
        return sums.sum(dim=0, keepdim=True).expand_as(sums) if self.shared_heads else sums

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """By density, `strict` or `paper`; or alike."""
        return BUDGETS[self.budget](self._densities(layers), budget, self.min_tokens)

    def upper_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The whole budget, shared out among these."""
        return BOUNDS[self.budget](self._densities(layers), budget, self.min_tokens)[: len(layers)]

    def lower_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """What is left where no layer to come has an entry below the threshold."""
        return LOWER_BOUNDS[self.budget](self._densities(layers), budget, self.min_tokens)[: len(layers)]

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The highest scores and a recent window."""
        return best_tokens(with_recent(scores, share_of(kept[0], self.recent_share)), kept)

    def sparsity(self, layer: ObservedLayer) -> float:
        """gamma': share of causal entries below the threshold; below 1, since every row keeps its maximum."""
        sweep = self._sweep(layer.prompt)
        entries = sum(row + 1 for row in sweep.rows)
        return 1.0 - layer[sweep].counts.double().mean().item() / entries

    def _densities(self, layers: Sequence[ObservedLayer]) -> list[float]:
        return [1.0 - self.sparsity(layer) for layer in layers]

    def _sweep(self, prompt: PromptShape) -> Sweep:
        return Sweep(post_vision_rows(prompt, self.max_rows), self.threshold)
