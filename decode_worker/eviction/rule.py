"""What a kind of eviction decides: how many rows a layer holds, and which one goes first.

How many follows from the number of generated tokens alone, so memory is known beforehand and a step waits for no
device. Which one may depend on attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from decode_worker.eviction.facts import RowFacts


class Rule(ABC):
    """One sequence's eviction; holds nothing that changes.

    Args:
        kept: [num_layers, num_kv_heads] int64, the prompt's rows.
    """

    goes_by_attention: ClassVar[bool] = False
    """Whether `worth` or `learn` need the attention of each generated token."""
    merges: ClassVar[bool] = False
    """Whether a row that goes may join one that stays; the heads of a layer then drop rows at the same steps."""

    def __init__(self, kept: np.ndarray) -> None:
        self.kept = kept

    def lender(self, layer: int) -> int | None:
        """The layer below whose rows this one reads, as it has none; None reads its own."""
        return None

    @cached_property
    def own_rows(self) -> np.ndarray:
        """[num_layers, num_kv_heads] bool, which heads get a row of each token."""
        own = [self.lender(layer) is None for layer in range(len(self.kept))]
        return np.repeat(np.array(own)[:, None], self.kept.shape[1], axis=1)

    def watches(self, layer: int) -> bool:
        """Whether a layer's attention from the current token is computed."""
        return self.goes_by_attention

    def select(self, attention: torch.Tensor) -> torch.Tensor | None:
        """Rows that the layers after a watched one read, until the next that is watched; None is all of them.

        Args:
            attention: [num_kv_heads, rows] fp32, of the watched layer; the new row is the last.

        Returns:
            [num_kv_heads, number] int64.
        """
        return None

    @abstractmethod
    def held(self, layer: int, kept: int, generated: int) -> int:
        """Rows that a KV head which began with `kept` holds after `generated` tokens; one more per token at most."""

    def most(self, layer: int, kept: int, generated: int) -> int:
        """Rows that it needs room for until then: a new one comes before an old one goes."""
        # right where `held` never falls
        return self.held(layer, kept, generated - 1) + 1 if generated else kept

    def learn(self, rows: RowFacts) -> None:
        """Takes note of the current token's attention; its own rows are known already."""
        return

    @abstractmethod
    def worth(self, rows: RowFacts) -> torch.Tensor:
        """[num_layers, num_kv_heads, places] fp64: the lowest goes; infinity must stay, or is not there."""

    def growth(self, tokens: int) -> list[int]:
        """Rows by which each KV head may grow at most while the first `tokens` come, layer-major."""
        return (self.most_rows(tokens) - self.kept).ravel().tolist()

    def held_rows(self, generated: int) -> np.ndarray:
        """`held` of all, [num_layers, num_kv_heads] int64."""
        return self._everywhere(self.held, generated)

    def most_rows(self, generated: int) -> np.ndarray:
        """`most` of all, [num_layers, num_kv_heads] int64."""
        return self._everywhere(self.most, generated)

    def _everywhere(self, count: Callable[[int, int, int], int], generated: int) -> np.ndarray:
        layers = enumerate(self.kept.tolist())
        return np.array([[count(layer, kept, generated) for kept in heads] for layer, heads in layers])


def worth_of(candidates: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The scores of those that may go."""
    return torch.where(candidates, scores.double(), torch.inf)
