"""PrefixKV (Wang et al., NeurIPS 2025, arXiv 2412.03409): every layer keeps the same share of its attention.

Idea: sorted by importance, tokens of one layer soon make up most of its attention, those of another do not. Layers are
filled until all have kept the same cumulative share, and the budget decides how large it is.

    score_j = sum over all rows i of the head mean of A_ij, over its total          one set for all KV heads
    P_l(o)  = share of the attention on the first o tokens of layer l, best first
    k_l     = min{o : P_l(o) >= p}   with the one p for which the layers' total is the budget

The first 4 tokens and the last one always stay; here they lead the order, and so P says what a layer really keeps (the
authors sort without them and keep them in addition). Theirs is a profile of a few samples made beforehand, with a p
found by bisection; here it is this prompt's own and exact: each token goes to the layer that has kept the least so far.
A budget of visual tokens counts from what the text, all of which stays, has kept already. Few rows see the end of a
prompt: sums over all of them rank a question that comes last below everything before it.

While tokens are generated, each layer goes on as in Elastic Cache, with the share that it kept of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch.nn import functional

from prefill_worker.compression.accumulated import OBSERVED, column_sums, received
from prefill_worker.compression.eviction import shares_kept
from prefill_worker.compression.policies.elastic_cache import DISTANCE
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import best_tokens, with_sinks
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer
from shared.kv.eviction import FixedSlot
from shared.request.params import MIN_KEPT_TOKENS

FIRST = 4
# By more a share of attention that was summed up is not off.
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class PrefixKV(Policy):
    """See the module."""

    name: ClassVar[str] = "prefix_kv"
    monotone: ClassVar[bool] = True

    rows: str = "all"
    """`all` as published, or `probe`: an approximation by few rows."""

    def __post_init__(self) -> None:
        self.require(self.rows in OBSERVED, f"rows must be one of {', '.join(OBSERVED)}, not {self.rows!r}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """All rows, or probes."""
        return (column_sums(prompt, self.rows),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Accumulated attention, shared by all heads; both ends stay."""
        sums = received(layer, self.rows)
        scores = with_sinks(sums.sum(dim=0, keepdim=True), FIRST)
        scores[:, -1] = torch.inf
        return scores.expand_as(sums)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The same share of the attention in each layer."""
        # of the first layers alone, it is their upper bounds: a further layer takes tokens from them
        return self._share_out(layers, budget)

    def lower_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """What is left where the attention of the layers to come is flat: such layers take the most."""
        return self._share_out(layers, budget, flat=budget.num_layers - len(layers))[: len(layers)]

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> FixedSlot:
        """Each layer by its own share."""
        return FixedSlot(retention=shares_kept(chosen), distance=DISTANCE)

    def _share_out(self, layers: Sequence[ObservedLayer], budget: TokenBudget, flat: int = 0) -> list[int]:
        """Among these layers, and `flat` more whose attention is as flat as can be."""
        prompt, fewest = layers[0].prompt, min(budget.num_tokens, MIN_KEPT_TOKENS)
        stays = ~prompt.visual if budget.num_tokens < prompt.num_tokens else torch.zeros_like(prompt.visual)
        found = [self._mass_before(layer, stays.to(layer.key.device)).cpu() for layer in layers]
        masses = torch.stack([*found, *[flattest(stays)] * flat])[:, prompt.num_tokens - budget.num_tokens :]
        masses[:, :fewest] = -1.0
        return lowest_first(masses, min(masses.numel(), max(budget.total, budget.num_layers * fewest)))

    def _mass_before(self, layer: ObservedLayer, stays: torch.Tensor) -> torch.Tensor:
        """Share of the attention that is kept already when the next best token comes, [num_tokens] float64."""
        scores = self.score(layer)[0].masked_fill(stays, torch.inf)
        order = scores.argsort(descending=True, stable=True)
        sums = received(layer, self.rows).sum(dim=0).double()[order]
        return functional.pad(sums.cumsum(dim=0)[:-1], (1, 0)) / sums.sum()


def flattest(stays: torch.Tensor) -> torch.Tensor:
    """Masses that those of no layer lie below, [num_tokens] float64: nothing on what stays, the same on all others.

    Args:
        stays: [num_tokens] bool, tokens that stay besides the two ends.
    """
    first = int(with_sinks(stays[None].float(), FIRST)[0, :-1].count_nonzero()) + 1
    others = torch.arange(len(stays), dtype=torch.float64) - first
    return (others / max(1, len(stays) - first) - ROUNDING).clamp_min(0.0)


def lowest_first(masses: torch.Tensor, total: int) -> list[int]:
    """Gives `total` tokens one by one to the layer that has kept the least, ties to the lower layer.

    Args:
        masses: [num_layers, tokens], what a layer has kept before each of its tokens; ascending in each layer.

    Returns:
        Tokens of each layer.
    """
    # since they ascend, the tokens that are given are those with the `total` lowest masses
    given = best_tokens(-masses.reshape(1, -1), [total]).view(masses.shape)
    return given.sum(dim=1).tolist()
