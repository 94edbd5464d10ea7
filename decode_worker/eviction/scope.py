"""SCOPE (Wu et al., ACL 2025, arXiv 2412.13649): the prompt's rows stay, generated ones have a budget of their own.

The last `recent` generated rows stay; of the others those that the current token attends to most.

    slide           budget = window, at every step
    adaptive        budget = recent + steps / delta, window at most, at every step
    discontinuous   the same budget, but rows go at every `delta`-th step only

Between its selections the discontinuous variant holds what came meanwhile (own choice).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from decode_worker.eviction.facts import RowFacts
from decode_worker.eviction.rule import Rule, worth_of
from shared.kv.eviction import Scope


class ScopeRule(Rule):
    """See the module."""

    goes_by_attention: ClassVar[bool] = True

    def __init__(self, numbers: Scope, kept: np.ndarray) -> None:
        super().__init__(kept)
        self._numbers = numbers

    def held(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`."""
        late = generated % self._numbers.delta if self._numbers.variant == "discontinuous" else 0
        selected = generated - late
        return kept + min(selected, self._budget(selected)) + late

    def most(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`; the discontinuous variant holds most right before it selects."""
        most = super().most(layer, kept, generated)
        selected = generated // self._numbers.delta * self._numbers.delta
        return max(most, super().most(layer, kept, selected))

    def worth(self, rows: RowFacts) -> torch.Tensor:
        """See `Rule`."""
        generated = rows.arrival >= 0
        return worth_of(generated & (rows.arrival < rows.generated - self._numbers.recent), rows.attention)

    def _budget(self, generated: int) -> int:
        numbers = self._numbers
        if numbers.variant == "slide":
            return numbers.window
        return min(numbers.window, numbers.recent + generated // numbers.delta)
