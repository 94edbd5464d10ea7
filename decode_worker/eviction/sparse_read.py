"""TidalDecode (Yang et al., ICLR 2025, arXiv 2410.05076): nothing goes, but most layers read few rows.

Some layers read everything and select the rows with the most attention, per KV head summed over its query heads; the
layers after them read only those, and the new one (own choice).
"""

from __future__ import annotations

import numpy as np
import torch

from decode_worker.eviction.facts import RowFacts
from decode_worker.eviction.rule import Rule
from shared.kv.eviction import SparseRead


class SparseReadRule(Rule):
    """See the module."""

    def __init__(self, numbers: SparseRead, kept: np.ndarray) -> None:
        super().__init__(kept)
        self._numbers = numbers

    def watches(self, layer: int) -> bool:
        """See `Rule`."""
        return layer in self._numbers.select_layers

    def select(self, attention: torch.Tensor) -> torch.Tensor | None:
        """See `Rule`; where there are no more rows than it would read, it reads all."""
        if attention.shape[1] <= self._numbers.top:
            return None
        worth = attention.clone()
        worth[:, -1] = torch.inf
        return worth.sort(dim=1, descending=True, stable=True).indices[:, : self._numbers.top]

    def held(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`."""
        return kept + generated

    def worth(self, rows: RowFacts) -> torch.Tensor:
        """See `Rule`: everything stays."""
        return torch.full(rows.arrival.shape, torch.inf)
