"""CAKE (Qin et al., ICLR 2025, arXiv 2503.12491): layers get what their attention's spread and change ask for.

Idea: a layer whose attention is spread over many tokens, and shifts from row to row, needs more of them; a token that
some rows look at and others do not may yet matter.

    over the last `window` rows i, for keys j before them, per query head:
    preference_l = entropy ** (1 / tau1) * variance ** (1 / tau2)
        entropy  = - sum over heads, i, j of A_ij ln A_ij              variance = sum over heads, j of var_i(A_ij)
    k_l          = window + preference_l / sum(preference) * L * (k - window)        k: mean tokens of a layer
    score_j      = mean over the KV head's query heads of pool(mean_i(A_ij) + gamma * var_i(A_ij))

As in the authors' code, whose exponents were tuned per model and cache size (1 where they were not: the default). What
a full layer cannot take goes to the others in proportion to their budgets, not in equal parts, and no layer falls below
the least number of tokens. Budgets are computed once, when all layers are known, not layer by layer as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.nn import functional

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.budget import strict_budget
from prefill_worker.compression.policies.snap_kv import MAX_KERNEL, MAX_WINDOW, pool_neighbours
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import last_rows
from prefill_worker.compression.selection import with_recent
from prefill_worker.compression.statistics import ObservedLayer, Statistic
from shared.request.params import MIN_KEPT_TOKENS

MIN_TAU, MAX_TAU, MAX_GAMMA = 0.1, 10.0, 1e6


class Spread(NamedTuple):
    """How attention lies on the keys before the window, and how it changes from row to row.

    Attributes:
        mean: [num_kv_heads, keys] fp32, over rows and the group's query heads.
        variance: [num_kv_heads, keys] fp32, over rows, mean over the group's query heads; 0 of a single row.
        entropy: [] fp32, sum over query heads and rows, in nats.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True)
class AttentionSpread(Statistic[Spread]):
    """Of the window's rows."""

    rows: range

    def measure(self, layer: LayerAttention) -> Spread:
        """See `Spread`."""
        weights = layer.weights(self.rows)[:, :, : self.rows.start]
        mean, grouped = weights.mean(dim=1), (len(layer.key), layer.group, self.rows.start)
        squares = (weights - mean[:, None]).square().sum(dim=1)
        return Spread(
            mean=mean.view(grouped).mean(dim=1),
            # unbiased, and nothing for a single row
            variance=squares.view(grouped).mean(dim=1) / max(1, len(self.rows) - 1),
            entropy=-torch.xlogy(weights, weights).sum(),
        )


@dataclass(frozen=True, kw_only=True)
class Cake(Policy):
    """See the module."""

    name: ClassVar[str] = "cake"

    window: int = 32
    """Last rows that are observed, and last tokens that always stay; in [1, 256]."""
    kernel: int = 5
    """Neighbouring positions whose scores are averaged, odd; 1 averages nothing."""
    gamma: float = 200.0
    """Weight of the variance beside the mean in a token's score; in [0, 1e6]."""
    tau1: float = 1.0
    """A larger one lets the entropy say less about a layer's budget; in [0.1, 10]."""
    tau2: float = 1.0
    """A larger one lets the variance say less about a layer's budget; in [0.1, 10]."""

    def __post_init__(self) -> None:
        self.require(1 <= self.window <= MAX_WINDOW, f"window must lie in [1, {MAX_WINDOW}], not {self.window}")
        odd = self.kernel % 2 == 1 and 1 <= self.kernel <= MAX_KERNEL
        self.require(odd, f"kernel must be odd and lie in [1, {MAX_KERNEL}], not {self.kernel}")
        self.require(0 <= self.gamma <= MAX_GAMMA, f"gamma must lie in [0, {MAX_GAMMA:g}], not {self.gamma}")
        for name, tau in (("tau1", self.tau1), ("tau2", self.tau2)):
            self.require(MIN_TAU <= tau <= MAX_TAU, f"{name} must lie in [{MIN_TAU}, {MAX_TAU:g}], not {tau}")

    def needs(self, prompt: PromptShape) -> tuple[AttentionSpread]:
        """The window's rows."""
        return (AttentionSpread(last_rows(prompt, self.window)),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Attention from the window and its change, pooled; the window itself is ranked above."""
        (statistic,) = self.needs(layer.prompt)
        spread, window = layer[statistic], len(statistic.rows)
        pooled = pool_neighbours(spread.mean + self.gamma * spread.variance, self.kernel, "avg")
        return with_recent(functional.pad(pooled, (0, window)), window)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The window everywhere, and the rest by preference."""
        mean = float(budget.retention) * budget.num_tokens
        window = min(self.window, mean)
        shares = self.layer_shares(layers)
        wanted = [window + share * budget.num_layers * (mean - window) for share in shares]
        return strict_budget(wanted, budget, MIN_KEPT_TOKENS)

    def layer_shares(self, layers: Sequence[ObservedLayer]) -> list[float]:
        """Preferences over their sum; equal where the window is all that there is."""
        (statistic,) = self.needs(layers[0].prompt)
        preferences = [self._preference(layer[statistic]) for layer in layers]
        total = math.fsum(preferences)
        return [preference / total if total else 1 / len(layers) for preference in preferences]

    def _preference(self, spread: Spread) -> float:
        variance = spread.variance.double().sum().item()
        # rounding takes an entropy of nothing below zero
        entropy = max(0.0, spread.entropy.item())
        return float(entropy ** (1 / self.tau1) * variance ** (1 / self.tau2))
