"""Attention accumulated over the whole prompt, for the methods that were published on every row.

`all` is what they say, and costs half as much again as the layer's attention. `probe` is an approximation: few rows
stand for all, and each key's sum is divided by the number of them that see it.
"""

from __future__ import annotations

import torch

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import Rows, all_rows, probe_rows
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer

OBSERVED = {"all": all_rows, "probe": probe_rows}


def column_sums(prompt: PromptShape, rows: str) -> ColumnSums:
    """What is measured: column sums of the rows that `all` or `probe` means."""
    return ColumnSums(OBSERVED[rows](prompt))


def received(layer: ObservedLayer, rows: str) -> torch.Tensor:
    """Attention that each key receives, [num_kv_heads, num_tokens] fp32: the sum of all rows, or the mean of probes."""
    statistic = column_sums(layer.prompt, rows)
    sums = layer[statistic]
    return sums if rows == "all" else sums / rows_that_see(statistic.rows, sums)


def rows_that_see(rows: Rows, keys: torch.Tensor) -> torch.Tensor:
    """How many of the rows lie at each key or after it, [num_tokens] fp32 for `keys` [.., num_tokens].

    Never 0 where the rows hold the last position.
    """
    places = torch.arange(keys.shape[-1], device=keys.device)
    positions = torch.tensor(rows, device=keys.device)
    return (len(rows) - torch.searchsorted(positions, places)).float()
