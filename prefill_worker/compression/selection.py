"""Choosing tokens by score: deterministic, ties to the lower position."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

# Shared out among recent tokens: far above every other score, and below infinity, which is what must stay.
RECENT = torch.finfo(torch.float32).max


def best_tokens(scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """The best tokens of each KV head. The set for a smaller count lies within the set for a larger one.

    Args:
        scores: [num_kv_heads, num_tokens].
        kept: Per head, between 1 and num_tokens.

    Returns:
        [num_kv_heads, num_tokens] bool with `kept` true per head.
    """
    if len(set(kept)) == 1:
        return _best(scores, kept[0])
    return torch.cat([_best(row[None], count) for row, count in zip(scores, kept, strict=True)])


def with_recent(scores: torch.Tensor, window: int) -> torch.Tensor:
    """The scores with the last `window` tokens, the latest first, above all others but those that must stay."""
    if window == 0:
        return scores
    raised = scores.clone()
    recency = torch.arange(1, window + 1, device=scores.device) / window * RECENT
    raised[:, -window:] = torch.maximum(raised[:, -window:], recency)
    return raised


def with_sinks(scores: torch.Tensor, sinks: int) -> torch.Tensor:
    """The scores with the first `sinks` tokens staying whatever comes."""
    raised = scores.clone()
    raised[:, :sinks] = torch.inf
    return raised


def with_text_first(scores: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Non-negative scores with text above every visual token; among themselves both keep their order.

    Args:
        scores: [num_kv_heads, num_tokens].
        visual: [num_tokens] bool.
    """
    return torch.where(visual, below_zero(scores), scores)


def below_zero(scores: torch.Tensor) -> torch.Tensor:
    """Scores of at least 0 in the same order, all below 0: under those that are left as they are."""
    # without the rounding that adding a constant to the others would cost
    return -1 / scores.clamp(min=torch.finfo(scores.dtype).tiny)


def share_of(kept: int, share: float) -> int:
    """floor(share * kept) for the decimal that was asked for, not its binary neighbour."""
    return int(Fraction(str(share)) * kept)


def _best(scores: torch.Tensor, wanted: int) -> torch.Tensor:
    """Several times faster than a stable sort."""
    assert 1 <= wanted <= scores.shape[1]
    lowest = scores.kthvalue(scores.shape[1] - wanted + 1, dim=1, keepdim=True).values
    better, tied = scores > lowest, scores == lowest
    missing = wanted - better.sum(dim=1, keepdim=True)
    return better | (tied & (tied.cumsum(dim=1) <= missing))
