"""The model's rotary embedding as statistics need it: taken off a prompt's queries, averaged over positions to come.

A rotation by cos and sin maps x to x * cos + half_turn(x) * sin; both are [.., head_dim], their halves equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Angles = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Positions [n], or [3, n] in time, height and width -> cos and sin [n, head_dim], fp32."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Rotation:
    """How one prompt's queries and keys were rotated.

    Attributes:
        angles: The model's.
        positions: [num_tokens], of the prompt, or [3, num_tokens].
        next_position: Of the first generated token.
    """

    angles: Angles
    positions: torch.Tensor
    next_position: int

    def undo(self, rotated: torch.Tensor) -> torch.Tensor:
        """The vectors [heads, num_tokens, head_dim] before their rotation, fp32."""
        cos, sin = self.angles(self.positions)
        vectors = rotated.float()
        # the squares sum to 1 but for models that scale both
        return (vectors * cos - half_turn(vectors) * sin) / (cos.square() + sin.square())

    def mean_of_next(self, count: int) -> torch.Tensor:
        """The mean rotation at the `count` positions that follow the prompt, a matrix [head_dim, head_dim] fp32."""
        following = torch.arange(count, device=self.positions.device) + self.next_position
        # what is generated has the same position in all axes
        cos, sin = (part.mean(dim=0) for part in self.angles(following.expand(*self.positions.shape[:-1], count)))
        identity = torch.eye(len(cos), device=cos.device)
        return cos[:, None] * identity + sin[:, None] * half_turn(identity).mT


def half_turn(vectors: torch.Tensor) -> torch.Tensor:
    """The second half of each vector [.., head_dim], negated, before the first: a quarter turn of each pair."""
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
