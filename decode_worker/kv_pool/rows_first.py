"""The attention of several steps of one sequence at once, as members of one batch over its memory."""

from __future__ import annotations

import torch

from decode_worker.eviction.attention import StepAttention


class RowsFirst:
    """The `LayerHook` of a batch whose members read each other's new rows.

    Args:
        dense: The batch's attention.
    """

    def __init__(self, dense: StepAttention) -> None:
        self._dense = dense

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; one query per member."""
        # threads take members in any order: what is appended once more while another reads it is the same bytes
        self._dense.append(layer, key[:, :, 0], value[:, :, 0])
        return self._dense.attend(layer, query, key, value, mask, scaling)
