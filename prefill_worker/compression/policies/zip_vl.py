"""ZipVL (He et al., ICCV 2025, arXiv 2410.08584): each layer decides how many tokens matter, and only these attend.

Idea: the attention of few probe rows says how many tokens hold nearly all of a layer's attention. These alone attend in
the pass, and their KV alone is kept; the others go on through the residual path.

    a_j = sum over probe rows i of A_ij, mean over heads; 64 recent rows and 64 random ones, n in all
    p   = fewest tokens whose a sum to theta * n
    T   = the p tokens with the highest a_j / (probe rows that see j), one set per layer shared by all heads

The kept share is an output: the retention is only its upper limit. Own choices: the limit bounds what is kept, not who
attends; where it is exceeded, layers are cut in proportion to their p (bounds as in VL-Cache's `strict` budget), by the
same scores. The last token is always in T; the random rows are drawn from a hash of the prompt. This is version 2 of
the paper: whatever is not in T is discarded (version 1 kept it in 2 bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.budget import strict_budget
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import probe_rows
from prefill_worker.compression.sparse.zip_vl import Importance, ImportantTokens, ZipVLPrefill
from prefill_worker.compression.statistics import ObservedLayer
from shared.request.params import MIN_KEPT_TOKENS


@dataclass(frozen=True, kw_only=True)
class ZipVL(Policy):
    """See the module."""

    name: ClassVar[str] = "zip_vl"

    theta: float = 0.975
    """Share of the probes' attention that the important tokens hold; in (0, 1], the paper has .96 to .975."""

    def __post_init__(self) -> None:
        self.require(0 < self.theta <= 1, f"theta must lie in (0, 1], not {self.theta}")

    def needs(self, prompt: PromptShape) -> tuple[ImportantTokens]:
        """Probe rows."""
        return (ImportantTokens(probe_rows(prompt), self.theta),)

    def sparse_prefill(self, prompt: PromptShape, budget: TokenBudget) -> ZipVLPrefill:
        """Important tokens attend, whatever the budget."""
        return ZipVLPrefill(*self.needs(prompt))

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Mean attention from the probes that see a token; the same for all heads."""
        return self._importance(layer).scores.expand(len(layer.key), -1)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """As many as are important, or in proportion to that."""
        important = [self._count(layer, budget) for layer in layers]
        if sum(important) <= max(budget.total, len(layers) * min(budget.num_tokens, MIN_KEPT_TOKENS)):
            return important
        limits = strict_budget([count / budget.num_tokens for count in important], budget, MIN_KEPT_TOKENS)
        return [min(pair) for pair in zip(important, limits, strict=True)]

    def _count(self, layer: ObservedLayer, budget: TokenBudget) -> int:
        """Important tokens of the budget's scope."""
        chosen = self._importance(layer).chosen
        if budget.num_tokens < layer.prompt.num_tokens:
            chosen = chosen & layer.prompt.visual.to(chosen.device)
        return max(1, int(chosen.sum()))

    def _importance(self, layer: ObservedLayer) -> Importance:
        (statistic,) = self.needs(layer.prompt)
        return layer[statistic]
