"""TGV-KV (ICML 2026, arXiv 2606.03075): text guides which visual tokens stay.

Idea: text is worth more than vision, and a visual token is worth what important text tokens pay to it. A layer whose
text looks more at the image keeps more.

    A        head-mean attention of the N post-vision rows P; text keys T = P, visual keys V
    share_l  ~ sum of A[P, V], scaled to the budget
    w_j      = (sum over rows of A[., j]) / (N - j)     for the j-th row's own token, j from 0: rows that see it
    score_i  = sum over j of w_j A[j, i]                for visual tokens
    text is ranked above, by its attention from P; the first 4 tokens and the last one stay; one choice for all KV heads

While tokens are generated, a layer that holds more than its share of all tokens seen so far drops the one that the
current token attends to least (head mean); the first 4 stay, and as many of the last as text was kept after the image.

Layer shares are clipped to the floor and 1 with the rest redistributed (the authors' code loses what it clips). Own
choices: P is capped, and text before the image is ranked by P's attention, too, instead of all rows'; P is the fallback
rows when nothing follows the image, and without an image the layers share alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.budget import strict_bounds, strict_budget, strict_lower_bounds
from prefill_worker.compression.eviction import shares_kept
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import MAX_ROWS, post_vision_rows
from prefill_worker.compression.selection import with_sinks, with_text_first
from prefill_worker.compression.statistics import ObservedLayer, Statistic
from shared.kv.eviction import TextGuard
from shared.request.params import MIN_KEPT_TOKENS

SINKS = 4
# Layer shares are in proportion to masses, and a mass of exactly zero has no proportion.
FAINTEST_MASS = 1e-9
# By so much at most a sum of attention in fp32 exceeds what it would be exactly.
ROUNDING = 1e-3


class TextGuidance(NamedTuple):
    """What the rows say.

    Attributes:
        received: [num_tokens] fp32, head-mean attention that each token receives.
        guided: [num_tokens] fp32, the same with each row weighted by its own token's worth.
    """

    received: torch.Tensor
    guided: torch.Tensor


@dataclass(frozen=True)
class TextGuided(Statistic[TextGuidance]):
    """Of the head-mean attention of `rows`."""

    rows: range

    def measure(self, layer: LayerAttention) -> TextGuidance:
        """See the module."""
        attention = layer.key.new_zeros(len(self.rows), layer.prompt.num_tokens, dtype=torch.float32)
        for positions, weights in layer.blocks(self.rows):
            attention[positions - self.rows.start, : weights.shape[2]] = weights.mean(dim=0)
        received = attention.sum(dim=0)
        seen_by = torch.arange(len(self.rows), 0, -1, device=attention.device)
        return TextGuidance(received, (received[self.rows.start :] / seen_by) @ attention)


@dataclass(frozen=True, kw_only=True)
class TGVKV(Policy):
    """See the module."""

    name: ClassVar[str] = "tgv_kv"
    monotone: ClassVar[bool] = True

    max_rows: int = MAX_ROWS
    """Post-vision rows observed at most, the last ones; 0 = all."""

    def __post_init__(self) -> None:
        self.require(self.max_rows >= 0, f"max_rows must not be negative, not {self.max_rows}")

    def needs(self, prompt: PromptShape) -> tuple[TextGuided]:
        """Post-vision rows, capped."""
        return (self._guided(prompt),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Text by attention received, visual tokens by text-guided attention; the same for all KV heads."""
        found = layer[self._guided(layer.prompt)]
        visual = layer.prompt.visual.to(found.received.device)
        scores = with_text_first(torch.where(visual, found.guided, found.received)[None], visual)
        protected = with_sinks(scores, SINKS)
        protected[:, -1] = torch.inf
        return protected.expand(len(layer.key), -1)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """In proportion to the attention from text to image."""
        return strict_budget(self._masses(layers), budget, MIN_KEPT_TOKENS)

    def upper_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The whole budget, shared out among these."""
        return strict_bounds(self._masses(layers), budget, MIN_KEPT_TOKENS)

    def lower_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """What is left where each row of the layers to come looks at the image alone."""
        most = len(self._guided(layers[0].prompt).rows) * (1 + ROUNDING)
        return strict_lower_bounds([mass / most for mass in self._masses(layers)], budget, MIN_KEPT_TOKENS)

    def eviction(self, prompt: PromptShape, chosen: Sequence[torch.Tensor], retention: Fraction) -> TextGuard:
        """Each layer by its own share; without a cap on the text that is counted."""
        rows = post_vision_rows(prompt, max_rows=0)
        text = ~prompt.visual[rows.start :]
        kept = tuple(int((layer[0, rows.start :].cpu() & text).sum()) for layer in chosen)
        return TextGuard(retention=shares_kept(chosen), sinks=SINKS, text=kept)

    def _masses(self, layers: Sequence[ObservedLayer]) -> list[float]:
        """Attention from text to image in each layer, positive."""
        visual = layers[0].prompt.visual
        guided = self._guided(layers[0].prompt)
        masses = [layer[guided].received.cpu()[visual].sum().item() for layer in layers]
        return [max(mass, FAINTEST_MASS) for mass in masses]

    def _guided(self, prompt: PromptShape) -> TextGuided:
        return TextGuided(post_vision_rows(prompt, self.max_rows))
