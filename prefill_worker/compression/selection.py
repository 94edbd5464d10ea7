"""Choosing tokens by score: deterministic, with a recent window, nested in the number kept."""

from __future__ import annotations

from fractions import Fraction

import torch


def select_top(scores: torch.Tensor, kept: int, recent_share: float) -> torch.Tensor:
    """The best tokens of each KV head, among them the most recent floor(recent_share * kept).

    Ties go to the lower position (stable sort; `topk` does not promise that). The set for a smaller `kept` lies
    within the set for a larger one.

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
    ranked = torch.sort(scores[:, :older], dim=1, descending=True, stable=True).indices
    window = torch.arange(older, num_tokens, device=scores.device).expand(num_heads, recent)
    return torch.cat([ranked[:, : kept - recent], window], dim=1).sort(dim=1).values
