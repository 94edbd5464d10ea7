"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): the least attended row goes.

Each KV head sums up the attention that its rows get, from the prompt's queries and from every generated token. Beyond
the budget the row with the lowest sum goes; the last `recent` rows stay.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from decode_worker.eviction.facts import RowFacts
from decode_worker.eviction.rule import Rule, worth_of
from shared.kv.eviction import HeavyHitters


class HeavyHittersRule(Rule):
    """See the module."""

    goes_by_attention: ClassVar[bool] = True

    def __init__(self, numbers: HeavyHitters, kept: np.ndarray) -> None:
        super().__init__(kept)
        self._numbers = numbers

    def held(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`."""
        return min(kept + generated, self._numbers.budget)

    def learn(self, rows: RowFacts) -> None:
        """See `Rule`."""
        rows.scores += rows.attention

    def worth(self, rows: RowFacts) -> torch.Tensor:
        """See `Rule`."""
        return worth_of(rows.arrival < rows.generated - self._numbers.recent, rows.scores)
