"""AirCache (Huang et al., ICCV 2025, arXiv 2503.23956): the text that leads the question judges the image.

Idea: only visual KV is compressed. Few text rows, those that the last token looks at most, say which visual tokens
matter; a layer whose visual tokens receive much and uneven attention keeps more of them.

    elite E   = {j in P : A_text[last, j] >= elite_share * max over P of A_text[last, .]}, head mean, P post-vision rows
    B         = softmax of rows E over visual keys and elite keys alone (their share of the causal attention)
    I_i       = mean over rows E and the KV head's query heads of B_i            for visual tokens i
    r_l       = (s_t' + s_k') / 2 * r    with strength s_t = sum(I), skewness s_k of I, primes: over their layer mean

There is no official code. Own choices: rows before the image cannot see it, so E is sought among post-vision rows (the
fallback rows stand in when nothing follows the image); sample skewness, negative ones count as none; shares above 1 are
redistributed. The budget is law: in cache scope it covers text, too, r = (retention * tokens - text) / visual, and
where not even the text fits, visual tokens go first and then the text that the post-vision rows look at least.
Prompts without an image are VL-Cache's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.budget import round_to_total, water_fill
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import MAX_ROWS, post_vision_rows
from prefill_worker.compression.selection import with_text_first
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer, Statistic
from shared.request.params import MIN_KEPT_TOKENS

# Shares are in proportion to signals, and a share of exactly zero has no proportion.
FAINTEST_SIGNAL = 1e-6


@dataclass(frozen=True)
class EliteAttention(Statistic[torch.Tensor]):
    """I: what elite rows among `candidates` pay to visual tokens, [num_kv_heads, num_tokens] fp32; 0 for text."""

    candidates: range
    share: float

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """See the module."""
        visual = layer.prompt.visual.to(layer.key.device)
        elite = self.elite_rows(layer)
        keys = visual.clone()
        keys[list(elite)] = True
        received = layer.key.new_zeros(layer.key.shape[:2], dtype=torch.float32)
        for _, weights in layer.blocks(elite):
            seen = weights.shape[2]
            shares = _renormalised(weights, keys[:seen])
            received[:, :seen] += shares.sum(dim=1).view(-1, layer.group, seen).mean(dim=1)
        return received / len(elite) * visual

    def elite_rows(self, layer: LayerAttention) -> tuple[int, ...]:
        """E, ascending; never empty, since the largest weight reaches its own share."""
        candidates = torch.tensor(self.candidates, device=layer.key.device)
        keys = ~layer.prompt.visual.to(layer.key.device)
        keys[candidates] = True
        last = layer.weights((self.candidates[-1],))
        weights = _renormalised(last, keys).mean(dim=(0, 1))[candidates]
        return tuple(candidates[weights >= self.share * weights.max()].tolist())


@dataclass(frozen=True, kw_only=True)
class AirCache(Policy):
    """See the module."""

    name: ClassVar[str] = "air_cache"

    elite_share: float = 0.9
    """a: a row is elite from this share of the largest weight in the last row on; in (0, 1]."""
    max_rows: int = MAX_ROWS
    """Post-vision rows among which the elite is sought, the last ones; 0 = all."""
    shared: bool = False
    """One selection for all KV heads of a layer instead of one per head."""

    def __post_init__(self) -> None:
        self.require(0 < self.elite_share <= 1, f"elite_share must lie in (0, 1], not {self.elite_share}")
        self.require(self.max_rows >= 0, f"max_rows must not be negative, not {self.max_rows}")

    def for_prompt(self, prompt: PromptShape) -> Policy:
        """VL-Cache where there is no image."""
        return self if prompt.num_visual else VLCache(max_rows=self.max_rows, shared_heads=self.shared)

    def needs(self, prompt: PromptShape) -> tuple[EliteAttention, ColumnSums]:
        """What the elite says of visual tokens, and what all candidates say of text."""
        rows = post_vision_rows(prompt, self.max_rows)
        return EliteAttention(rows, self.elite_share), ColumnSums(rows)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Importance of visual tokens; text above."""
        importance, received = (layer[statistic] for statistic in self.needs(layer.prompt))
        visual = layer.prompt.visual.to(importance.device)
        scores = torch.where(visual, importance, received)
        if self.shared:
            scores = scores.mean(dim=0, keepdim=True).expand_as(scores)
        return with_text_first(scores, visual)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """Text everywhere, and the visual tokens that are left by strength and skewness."""
        visual = layers[0].prompt.num_visual
        # of a budget for the visual tokens alone this is nothing
        text = budget.num_tokens - visual
        total = max(budget.total, budget.num_layers * min(budget.num_tokens, MIN_KEPT_TOKENS))
        total -= budget.num_layers * text
        if total <= 0:
            return budget.uniform()
        fewest = max(0, MIN_KEPT_TOKENS - (layers[0].prompt.num_tokens - visual)) / visual
        shares = water_fill(self._signals(layers), total / (budget.num_layers * visual), min(1.0, fewest))
        return [text + kept for kept in round_to_total([share * visual for share in shares], total, visual)]

    def _signals(self, layers: Sequence[ObservedLayer]) -> list[float]:
        prompt = layers[0].prompt
        statistic, _ = self.needs(prompt)
        images = [layer[statistic].double().mean(dim=0).cpu()[prompt.visual] for layer in layers]
        return layer_signals([image.sum().item() for image in images], [skewness(image) for image in images])


def layer_signals(strengths: Sequence[float], skews: Sequence[float]) -> list[float]:
    """(s_t' + s_k') / 2 of each layer, positive; a signal that no layer has says nothing."""
    positive = [max(0.0, skew) for skew in skews]
    known = [_over_their_mean(signal) for signal in (strengths, positive) if any(signal)]
    means = [math.fsum(layer) / len(known) for layer in zip(*known, strict=True)] or [1.0] * len(skews)
    return [max(mean, FAINTEST_SIGNAL) for mean in means]


def skewness(values: torch.Tensor) -> float:
    """Of a sample [n] float64; 0 where fewer than three values or equal ones have none."""
    count = len(values)
    if count < 3 or values.max() == values.min():
        return 0.0
    deviations = (values - values.mean()) / values.std()
    return deviations.pow(3).sum().item() * count / ((count - 1) * (count - 2))


def _over_their_mean(signals: Sequence[float]) -> list[float]:
    mean = math.fsum(signals) / len(signals)
    return [signal / mean for signal in signals]


def _renormalised(weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Softmax over `keys` [n] bool alone, from one over all of them; 0 where a row sees none of them."""
    among = weights * keys
    return among / among.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
