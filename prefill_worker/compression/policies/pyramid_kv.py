"""PyramidKV (Cai et al., COLM 2025, arXiv 2406.02069): SnapKV with more tokens in lower layers.

Idea: attention is spread in lower layers and gathers on few tokens in higher ones, so budgets fall from layer to layer.

    B = k - window, least = B / beta, most = 2B - least            k: mean tokens of a layer
    k_l = window + most - l * (most - least) / (L - 1)             l = 0 .. L-1; tokens as SnapKV scores them
    most > tokens - window: most = tokens - window, least = 2B - most

The authors' code rounds each layer down, keeps everything of prompts shorter than k and gives all layers the same below
2B tokens; here there is no such exception, the total is kept to the token, and no layer falls below the least number of
tokens. A budget within the window leaves nothing to the pyramid: all layers get the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prefill_worker.compression.budget import strict_budget
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policy import TokenBudget
from prefill_worker.compression.statistics import ObservedLayer
from shared.request.params import MIN_KEPT_TOKENS

MAX_BETA = 1000


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """See the module; the parameters of `SnapKV`, and one of its own."""

    name: ClassVar[str] = "pyramid_kv"

    beta: float = 20.0
    """How many times the mean the last layer's share lies below it, the window aside; in [1, 1000], 1 is uniform."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.beta <= MAX_BETA, f"beta must lie in [1, {MAX_BETA}], not {self.beta}")

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """Falling in equal steps."""
        mean = float(budget.retention) * budget.num_tokens
        window = min(self.window, mean)
        most, least = self._ends(mean - window, budget.num_tokens - window)
        steps = max(1, budget.num_layers - 1)
        wanted = [window + most - layer * (most - least) / steps for layer in range(budget.num_layers)]
        return strict_budget(wanted, budget, MIN_KEPT_TOKENS)

    def _ends(self, mean: float, tokens: float) -> tuple[float, float]:
        """Of the first and of the last layer, mirrored at their mean; no layer holds more than `tokens`."""
        most = min(2 * mean - mean / self.beta, tokens)
        return most, 2 * mean - most
