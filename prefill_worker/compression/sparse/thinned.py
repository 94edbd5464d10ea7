"""A layer that only some of the prompt's tokens reached, as statistics see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from prefill_worker.compression.attention import BLOCK_ROWS, LayerAttention
from prefill_worker.compression.rows import Rows
from shared.kernels.reference.statistics import PostVisionStatistics


@dataclass(eq=False, kw_only=True)
class ThinnedAttention(LayerAttention):
    """Rows and keys are counted in the prompt's positions, as in a whole layer; queries, keys and values are fewer.

    A token that was dropped has no row, and its key receives no attention.

    Attributes:
        places: [tokens of the layer] int64, their positions in the prompt, ascending.
    """

    places: torch.Tensor

    def sweep(self, rows: range, threshold: float) -> PostVisionStatistics:
        """See the base; the rows that are left of these."""
        first = int((self.places < rows.start).sum())
        found = super().sweep(range(first, len(self.places)), threshold)
        return found._replace(column_sums=self._spread(found.column_sums))

    def blocks(self, rows: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See the base; the rows that are left of these."""
        positions = torch.tensor(rows, device=self.places.device)
        left = positions[torch.isin(positions, self.places)]
        for start in range(0, len(left), BLOCK_ROWS):
            chosen = left[start : start + BLOCK_ROWS]
            weights = self._weights(torch.searchsorted(self.places, chosen))
            yield chosen, self._spread(weights)[..., : int(chosen[-1]) + 1]

    def _spread(self, columns: torch.Tensor) -> torch.Tensor:
        """[.., first tokens of the layer] -> [.., num_tokens of the prompt], 0 for all others."""
        whole = columns.new_zeros(*columns.shape[:-1], self.prompt.num_tokens)
        return whole.index_copy_(-1, self.places[: columns.shape[-1]], columns)
