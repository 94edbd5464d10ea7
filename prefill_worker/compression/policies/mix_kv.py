"""MixKV (ICLR 2026, arXiv 2510.20707): importance mixed with diversity, the more so the more alike a head's keys are.

Idea: many visual tokens say the same, and the best ones by attention are then copies of each other. A KV head whose
keys point the same way should rather keep what differs.

    r       = (T^2 |u|^2 - T) / (T (T - 1))         mean cosine of two different keys; u = mean of the unit keys k_j
    norm_j  = |v_j|,  div_j = -k_j . u               both min-max to [0, 1], then scaled to the mean of attn
    score_j = (1 - r) (attn_j + norm_j) + r div_j    per KV head, attn = score of the base policy

Base, its budgets and its window are those of SnapKV or VL-Cache with their defaults, but that each KV head selects for
itself in either; tokens of SnapKV's window take no part. The authors' code reads r from a table that was made offline
for one model; here it is the prompt's, by their formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import ObservedLayer, Statistic

SNAP_KV, VL_CACHE = SnapKV(), VLCache(shared_heads=False)
BASES: dict[str, Policy] = {base.name: base for base in (SNAP_KV, VL_CACHE)}
# Divisors that are 0 only where what they divide is 0, too.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class MixKV(Policy):
    """See the module."""

    name: ClassVar[str] = "mix_kv"
    monotone: ClassVar[bool] = True

    base: str = SNAP_KV.name
    """The policy whose scores are mixed, and that budgets: `snap_kv` or `vl_cache`."""

    def __post_init__(self) -> None:
        self.require(self.base in BASES, f"base must be one of {', '.join(BASES)}, not {self.base!r}")

    def needs(self, prompt: PromptShape) -> tuple[Statistic[Any], ...]:
        """The base's."""
        return BASES[self.base].needs(prompt)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """The base's scores before its window, mixed."""
        scores = BASES[self.base].score(layer)
        end = layer.prompt.num_tokens - (SNAP_KV.window if self.base == SNAP_KV.name else 0)
        if end <= 0:
            return scores
        mixed = mix(scores[:, :end], layer.key[:, :end].float(), layer.value[:, :end].float())
        return torch.cat((mixed, scores[:, end:]), dim=1)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The base's."""
        return BASES[self.base].allocate(layers, budget)

    def upper_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The base's."""
        return BASES[self.base].upper_bounds(layers, budget)

    def lower_bounds(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The base's."""
        return BASES[self.base].lower_bounds(layers, budget)

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The base's."""
        return BASES[self.base].select(scores, kept)


def mix(attention: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The mixed scores, as `attention`.

    Args:
        attention: [num_kv_heads, tokens], not negative.
        key: [num_kv_heads, tokens, head_dim] fp32.
        value: As `key`.
    """
    unit = key / key.norm(dim=-1, keepdim=True).clamp_min(TINY)
    mean = unit.mean(dim=1, keepdim=True)
    norm = _like(attention, value.norm(dim=-1))
    diversity = _like(attention, -(unit * mean).sum(dim=-1))
    redundancy = _mean_cosine(mean, key.shape[1])
    return (1 - redundancy) * (attention + norm) + redundancy * diversity


def _mean_cosine(mean: torch.Tensor, tokens: int) -> torch.Tensor:
    """r of `tokens` unit keys with this mean [num_kv_heads, 1, head_dim], off the diagonal; [num_kv_heads, 1]."""
    return (mean.square().sum(dim=-1) * tokens - 1) / max(1, tokens - 1)


def _like(attention: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Min-max to [0, 1], then to the mean of `attention`; both [num_kv_heads, tokens]."""
    lowest, highest = values.aminmax(dim=1, keepdim=True)
    shares = (values - lowest) / (highest - lowest).clamp_min(TINY)
    return shares * (attention.mean(dim=1, keepdim=True) / shares.mean(dim=1, keepdim=True).clamp_min(TINY))
