"""The pass of KVSharer (arXiv 2410.18517): some layers attend to another one's keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefill_worker.compression.sparse.prefill import SparsePrefill


@dataclass(frozen=True)
class KVSharerPrefill(SparsePrefill):
    """By their numbers, the lender of each layer that borrows."""

    lender_of: Mapping[int, int]

    def lender(self, layer: int) -> int | None:
        """See `SparsePrefill`."""
        return self.lender_of.get(layer)
