"""SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469): the last tokens of the prompt say what matters.

Idea: what the answer will look at is what the prompt's last tokens look at; neighbours of such tokens matter, too.

    score_j = pool(sum over the last `window` rows i of A_ij)   for j before the window, per KV head
    the window itself always stays; the same number of tokens in every layer

Pooling is over positions: the mean of `kernel` neighbours (the authors' default), or their maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import last_rows
from prefill_worker.compression.selection import with_recent
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer

POOLINGS = ("avg", "max")
MAX_WINDOW, MAX_KERNEL = 256, 63


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """See the module."""

    name: ClassVar[str] = "snap_kv"
    monotone: ClassVar[bool] = True

    window: int = 32
    """Last rows that are observed, and last tokens that always stay; in [1, 256]."""
    kernel: int = 5
    """Neighbouring positions that are pooled, odd; 1 pools nothing."""
    pooling: str = "avg"
    """`avg` or `max`."""

    def __post_init__(self) -> None:
        self.require(1 <= self.window <= MAX_WINDOW, f"window must lie in [1, {MAX_WINDOW}], not {self.window}")
        odd = self.kernel % 2 == 1 and 1 <= self.kernel <= MAX_KERNEL
        self.require(odd, f"kernel must be odd and lie in [1, {MAX_KERNEL}], not {self.kernel}")
        self.require(self.pooling in POOLINGS, f"pooling must be one of {', '.join(POOLINGS)}, not {self.pooling!r}")

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """The window's rows."""
        return (ColumnSums(last_rows(prompt, self.window)),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Pooled attention from the window; the window itself is ranked above."""
        (sums,) = self.needs(layer.prompt)
        window = len(sums.rows)
        earlier = layer[sums][:, : layer.prompt.num_tokens - window]
        pooled = pool_neighbours(earlier, self.kernel, self.pooling)
        return with_recent(functional.pad(pooled, (0, window)), window)


def pool_neighbours(scores: torch.Tensor, kernel: int, pooling: str) -> torch.Tensor:
    """Mean or maximum over `kernel` neighbouring positions of [num_kv_heads, positions]; zeros beyond the ends."""
    if scores.shape[1] == 0:
        return scores
    pool = functional.avg_pool1d if pooling == "avg" else functional.max_pool1d
    return pool(scores, kernel, stride=1, padding=kernel // 2)
