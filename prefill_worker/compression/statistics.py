"""What a policy may ask to be measured in each layer. Equal statistics are measured once, whoever asks.

A policy whose method needs something else defines its own statistic beside its formula: a frozen dataclass with one
method. It must reduce: what it returns is held for all layers until the budgets are known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import Rows
from shared.kernels.reference.statistics import PostVisionStatistics

T_co = TypeVar("T_co", covariant=True)


class Statistic(ABC, Generic[T_co]):
    """A frozen, hashable description of a measurement."""

    @abstractmethod
    def measure(self, layer: LayerAttention) -> T_co:
        """Called once per layer in the model thread, right before the layer attends."""

    def first_row(self, prompt: PromptShape) -> int:
        """The first query that it looks at: those before may be missing, as keys and values never are."""
        return 0


@dataclass(frozen=True)
class ColumnSums(Statistic[torch.Tensor]):
    """Attention that each key receives from `rows`, [num_kv_heads, num_tokens] fp32, summed over the group."""

    rows: Rows

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """See the class."""
        return layer.column_sums(self.rows)

    def first_row(self, prompt: PromptShape) -> int:
        """Of the rows."""
        return min(self.rows, default=prompt.num_tokens)


@dataclass(frozen=True)
class Sweep(Statistic[PostVisionStatistics]):
    """Column sums, and per query head how many entries reach `threshold` times their row's maximum."""

    rows: range
    threshold: float

    def measure(self, layer: LayerAttention) -> PostVisionStatistics:
        """See the class."""
        return layer.sweep(self.rows, self.threshold)

    def first_row(self, prompt: PromptShape) -> int:
        """Of the rows."""
        return self.rows.start


@dataclass(frozen=True, kw_only=True)
class ObservedLayer:
    """What a policy sees of a layer when it scores.

    Attributes:
        key: [num_kv_heads, num_tokens, head_dim], rotated; in a sparse pass only of the tokens that the layer has.
        value: As `key`.
        lender: The layer below whose keys and values these are, as it attended to them; None has its own.
        survivors: [num_tokens] bool, the tokens that reached the last layer of a sparse pass; None when all did.
        ahead: [num_kv_heads, num_tokens] fp32, attention that each token received from the answer's first tokens,
            summed over these and the group; None unless the policy looks ahead.
        scores: What the policy scored while the layer was whole, of one that has lost its KV since, where keys and
            values have a head_dim of 0; else None.
    """

    prompt: PromptShape
    key: torch.Tensor
    value: torch.Tensor
    measured: Mapping[Statistic[Any], Any]
    lender: int | None = None
    survivors: torch.Tensor | None = None
    ahead: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    def __getitem__(self, statistic: Statistic[T_co]) -> T_co:
        """What was measured; the policy must have declared it."""
        return cast("T_co", self.measured[statistic])


def measure_all(statistics: Iterable[Statistic[Any]], layer: LayerAttention) -> dict[Statistic[Any], Any]:
    """Each statistic once, in the order of their declaration."""
    return {statistic: statistic.measure(layer) for statistic in statistics}
