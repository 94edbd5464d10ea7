"""FastV (Chen et al., ECCV 2024, arXiv 2403.06764): deeper layers do without most image tokens, in the pass itself.

Idea: after the first layers little attention falls on image tokens; those that the last token of the prompt does not
look at need not be computed any further.

    after `layer` layers keep all text and the s image tokens with the highest attention of the last row there, mean
    over heads; the others are dropped from all deeper layers: hidden states, KV and all

They are dropped once, not at each step, and positions stay. Own choices: s is what makes the KV of all layers together
fit the budget, the first layers holding every token (the paper fixes the dropped share R; `image_share` = 1 - R bounds
s from above). Where even s = 0 would exceed the budget, every layer keeps the same number of tokens: the first layers
are cut to survivors, too. Text outranks image tokens; where it exceeds the budget alone, the KV of the text that the
layer's own last row looks at least is not kept, though all text is computed. The last token always stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import share_of
from prefill_worker.compression.sparse.fast_v import FastVPrefill, LastRow, ranked
from prefill_worker.compression.statistics import ObservedLayer
from shared.request.params import MIN_KEPT_TOKENS

MAX_LAYER = 1024


@dataclass(frozen=True, kw_only=True)
class FastV(Policy):
    """See the module."""

    name: ClassVar[str] = "fast_v"

    layer: int = 2
    """K: layers that compute every token; in [1, 1024]."""
    image_share: float = 1.0
    """Share of the image tokens that may survive at most, 1 - R of the paper (.5 or .25 there); in [0, 1]."""

    def __post_init__(self) -> None:
        self.require(1 <= self.layer <= MAX_LAYER, f"layer must lie in [1, {MAX_LAYER}], not {self.layer}")
        self.require(0 <= self.image_share <= 1, f"image_share must lie in [0, 1], not {self.image_share}")

    def needs(self, prompt: PromptShape) -> tuple[LastRow]:
        """The last row."""
        return (LastRow(),)

    def sparse_prefill(self, prompt: PromptShape, budget: TokenBudget) -> FastVPrefill | None:
        """Drops the image tokens that the budget has no room for in deep layers."""
        if self.layer >= budget.num_layers:
            return None
        _, deep = self._plan(prompt, budget)
        text = prompt.num_tokens - prompt.num_visual
        images = deep - (budget.num_tokens - prompt.num_visual)
        kept = text + max(images, int(prompt.visual[-1]))
        return FastVPrefill(prompt=prompt, layer=self.layer, kept=kept) if kept < prompt.num_tokens else None

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Survivors first; among them the last token, text, image tokens, each by the last row."""
        scores = ranked(layer[LastRow()], layer.prompt)
        if layer.survivors is not None:
            scores = scores.masked_fill(~layer.survivors, -1.0)
        return scores.expand(len(layer.key), -1)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """Everything in the first layers and survivors in the others, or the same in all."""
        first, deep = self._plan(layers[0].prompt, budget)
        return [first if layer < self.layer else deep for layer in range(len(layers))]

    def _plan(self, prompt: PromptShape, budget: TokenBudget) -> tuple[int, int]:
        """Tokens of the budget's scope that are kept in each of the first layers, and in each deeper one."""
        tokens, images = budget.num_tokens, prompt.num_visual
        text = tokens - images
        total = max(budget.total, budget.num_layers * min(tokens, MIN_KEPT_TOKENS))
        deep_layers = budget.num_layers - self.layer
        most = max(1, text + share_of(images, self.image_share))
        deep = (total - self.layer * tokens) // deep_layers if deep_layers > 0 else 0
        if deep >= max(1, text):
            return tokens, min(deep, most)
        same = min(total // budget.num_layers, most)
        return same, same
