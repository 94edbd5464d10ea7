"""The attention of the prefill pass: plain SDPA, and statistics of the rows that the policy observes."""

from __future__ import annotations

import threading
import time

import torch

from prefill_worker.compression.policy import LayerStatistics
from shared.errors import RequestCancelledError
from shared.kernels.dispatch import kernels_for


class PrefillObserver:
    """The `LayerHook` of one prefill pass.

    Cancellation is checked before every layer, so a departed client costs at most one layer of compute.

    Args:
        rows: Positions whose attention rows are observed; empty observes nothing.
        threshold: Share of a row's maximum below which an entry does not count.
        cancelled: Set from another thread to stop the pass.
    """

    def __init__(self, rows: range, threshold: float, cancelled: threading.Event) -> None:
        self._rows = rows
        self._threshold = threshold
        self._cancelled = cancelled
        self.statistics: list[LayerStatistics] = []
        self.statistics_seconds = 0.0
        self.first_layer_at: float | None = None

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; batch is 1."""
        if self._cancelled.is_set():
            raise RequestCancelledError(f"cancelled before layer {layer}")
        if self.first_layer_at is None:
            self.first_layer_at = time.monotonic()
        if self._rows:
            self._observe(query[0], key[0], scaling)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2)

    def _observe(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        started = time.monotonic()
        first = self._rows.start
        kernels = kernels_for(key.device)
        found = kernels.post_vision_statistics(query[:, first:], key, first, scaling, self._threshold)
        self.statistics.append(
            LayerStatistics(
                column_mass=found.column_sums,
                kept_entries=found.counts,
                causal_entries=sum(row + 1 for row in self._rows),
                row_mass=len(self._rows) * (query.shape[0] // key.shape[0]),
            )
        )
        self.statistics_seconds += time.monotonic() - started
