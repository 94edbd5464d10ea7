"""The pass of ZipVL (arXiv 2410.08584): a layer's important tokens attend among themselves, all others not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from prefill_worker.compression.accumulated import rows_that_see
from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.rows import Rows
from prefill_worker.compression.selection import best_tokens
from prefill_worker.compression.sparse.prefill import Measured, SparsePrefill, causal_attention
from prefill_worker.compression.statistics import Statistic


class Importance(NamedTuple):
    """What probe rows say about a layer.

    Attributes:
        scores: [num_tokens] fp32, mean attention from the probe rows that see the token; infinity for the last one.
        chosen: [num_tokens] bool, the important ones.
    """

    scores: torch.Tensor
    chosen: torch.Tensor


@dataclass(frozen=True)
class ImportantTokens(Statistic[Importance]):
    """How many tokens hold `theta` of the probes' attention, and as many of the best by score."""

    rows: Rows
    theta: float

    def measure(self, layer: LayerAttention) -> Importance:
        """See the class."""
        sums = layer.column_sums(self.rows).sum(dim=0) / len(layer.query)
        scores = sums / rows_that_see(self.rows, sums)
        scores[-1] = torch.inf
        return Importance(scores, best_tokens(scores[None], [self._count(sums)])[0])

    def _count(self, sums: torch.Tensor) -> int:
        """Fewest tokens that together receive theta of what all rows give, one each."""
        held = sums.double().sort(descending=True).values.cumsum(dim=0)
        return min(len(sums), 1 + int((held < self.theta * len(self.rows)).sum()))


@dataclass(frozen=True)
class ZipVLPrefill(SparsePrefill):
    """Attention among a layer's important tokens."""

    importance: ImportantTokens

    def attend(self, layer: LayerAttention, measured: Measured) -> torch.Tensor:
        """Zeros for all others, which go on through the residual path."""
        among = measured[self.importance].chosen.nonzero().flatten()
        query, key, value = (tensor[:, among] for tensor in (layer.query, layer.key, layer.value))
        output = torch.zeros_like(layer.query)
        return output.index_copy_(1, among, causal_attention(query, key, value, layer.scaling))
