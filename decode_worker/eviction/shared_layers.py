"""KVSharer (Yang et al., 2024, arXiv 2410.18517): nothing goes, but some layers have no rows.

Such a layer attends with its own queries to the rows of another one, which it sees with the newest among them: that
layer lies below. Its own K and V of a new token are never stored.
"""

from __future__ import annotations

import numpy as np
import torch

from decode_worker.eviction.facts import RowFacts
from decode_worker.eviction.rule import Rule
from shared.kv.eviction import SharedLayers


class SharedLayersRule(Rule):
    """See the module."""

    def __init__(self, numbers: SharedLayers, kept: np.ndarray) -> None:
        super().__init__(kept)
        self._lender_of = dict(zip(numbers.borrowers, numbers.lenders, strict=True))

    def lender(self, layer: int) -> int | None:
        """See `Rule`."""
        return self._lender_of.get(layer)

    def held(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`."""
        return 0 if layer in self._lender_of else kept + generated

    def most(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`: none goes."""
        return self.held(layer, kept, generated)

    def worth(self, rows: RowFacts) -> torch.Tensor:
        """See `Rule`: everything stays."""
        return torch.full(rows.arrival.shape, torch.inf)
