"""ThinK (Xu et al., ICLR 2025, arXiv 2407.21018): which channels of K are sent of each KV head.

A channel's worth is the mean of q_c^2 over the last 32 queries times the mean of k_c^2 over the kept tokens; the
channels of least worth are dropped, floor((1 - share) * head_dim) of them, and arrive as zeros, which is what a mask on
the queries' channels comes to. Own choices: queries of a GQA group are averaged, as only they share a K; ties go to the
lower channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import best_tokens
from prefill_worker.compression.statistics import Statistic
from prefill_worker.engine.engine import Prefilled
from shared.kv.layout import KVLayout
from shared.request.params import Wire

LAST_QUERIES = 32


@dataclass(frozen=True)
class QuerySquares(Statistic[torch.Tensor]):
    """Mean square of each query channel over the last `window` queries and the group, [num_kv_heads, head_dim] fp32."""

    window: int

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """See the class. The last queries of the layer, in a sparse pass, too, where others may have left."""
        squares = layer.query[:, -self.window :].float().square().mean(dim=1)
        return squares.unflatten(0, (len(layer.key), layer.group)).mean(dim=1)

    def first_row(self, prompt: PromptShape) -> int:
        """The last queries are there as long as there is so much text."""
        return max(0, prompt.num_tokens - self.window)


QUERIES = QuerySquares(LAST_QUERIES)


def wire_statistics(wire: Wire) -> tuple[QuerySquares, ...]:
    """What the wire stage needs of each layer, at retention 1, too."""
    return (QUERIES,) if wire.key_channels < 1 else ()


def sent_channels(
    prefilled: Prefilled, rows: torch.Tensor, layout: KVLayout, num_kept: Sequence[int], key_channels: int
) -> torch.Tensor:
    """The channels of most worth: [num_layers, num_kv_heads, head_dim] bool, `key_channels` true each.

    Args:
        prefilled: A pass that measured `wire_statistics`.
        rows: [all kept rows, head_dim] in the order of `KVLayout.sections`.
        num_kept: Layer-major, one count per layer and KV head.
    """
    chosen, row = [], 0
    for measured, section in zip(prefilled.measured, layout.sections(num_kept), strict=True):
        keys = rows[row : row + sum(section.rows)]
        # a layer that borrows has no row, and it does not matter which channels of none are sent
        squares = torch.stack([_mean(head.float().square()) for head in keys.split(section.rows)])
        chosen.append(best_tokens(measured[QUERIES] * squares, [key_channels] * len(squares)))
        row += 2 * len(keys)
    return torch.stack(chosen)


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Over [rows, channels]; zeros where there are none."""
    return rows.sum(dim=0) / max(1, len(rows))
