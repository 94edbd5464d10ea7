"""Choosing tokens by score: deterministic, with a recent window, nested in the number kept."""

from __future__ import annotations

from fractions import Fraction

import torch


def select_top(scores: torch.Tensor, kept: int, recent_share: float) -> torch.Tensor:
    """The best tokens of each KV head, among them the most recent floor(recent_share * kept).

    Ties go to the lower position. The set for a smaller `kept` lies within the set for a larger one.

    Args:
        scores: [num_kv_heads, num_tokens].
        kept: Between 1 and num_tokens.
        recent_share: In [0, 1], share of `kept` that always goes to the last tokens.

    Returns:
        [num_kv_heads, kept] int64, ascending.
    """
    num_heads, num_tokens = scores.shape
    # the decimal that was asked for, not its binary neighbour
    recent = int(Fraction(str(recent_share)) * kept)
    older = num_tokens - recent
    chosen = torch.ones_like(scores, dtype=torch.bool)
    chosen[:, :older] = _best(scores[:, :older], kept - recent)
    return chosen.flatten().nonzero().view(num_heads, kept) % num_tokens


def _best(scores: torch.Tensor, wanted: int) -> torch.Tensor:
    """[num_kv_heads, num_tokens] bool with `wanted` true per head: several times faster than a stable sort."""
    if wanted == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    lowest = scores.kthvalue(scores.shape[1] - wanted + 1, dim=1, keepdim=True).values
    better, tied = scores > lowest, scores == lowest
    missing = wanted - better.sum(dim=1, keepdim=True)
    return better | (tied & (tied.cumsum(dim=1) <= missing))
