"""Runs a policy over the statistics of one prompt: score, allocate, select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from prefill_worker.compression.policy import LayerStatistics, Policy, TokenBudget


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is kept of one layer.

    Attributes:
        indices: [num_kv_heads, kept] int64, ascending; None keeps everything.
        attention_mass: Share of the observed attention that falls on kept tokens.
    """

    indices: torch.Tensor | None
    attention_mass: float


def select_tokens(
    policy: Policy, layers: Sequence[LayerStatistics], retention: Fraction, num_tokens: int
) -> list[Selection]:
    """One selection per layer. Deterministic; nothing is mixed across requests."""
    budget = TokenBudget(retention=retention, num_tokens=num_tokens, num_layers=len(layers))
    kept = policy.allocate(layers, budget)
    return [_select_layer(policy, layer, count) for layer, count in zip(layers, kept, strict=True)]


def keep_everything(num_layers: int) -> list[Selection]:
    """Retention 1."""
    return [Selection(indices=None, attention_mass=1.0)] * num_layers


def _select_layer(policy: Policy, layer: LayerStatistics, kept: int) -> Selection:
    indices = policy.select(policy.score(layer), kept)
    mass = layer.column_mass.gather(1, indices).sum(dim=1).mean().item() / layer.row_mass
    return Selection(indices=indices, attention_mass=min(1.0, mass))
