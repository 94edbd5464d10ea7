"""D2O (Wan et al., ICLR 2025, arXiv 2406.13035): heavy hitters, and what goes may join what stays.

As in H2O each KV head sums up the attention that its rows get, and beyond its layer's budget the row with the lowest
sum goes; the first `sinks` rows and the last `recent` stay. The row y that goes is merged into the row x with the most
similar key if their cosine reaches the layer's threshold:

    threshold = (threshold + mean over the layer's heads of cos(x, y)) / 2        at first that mean
    x         = (x + cos(x, y) * y) / 2                                           K and V alike

Own choices: the average begins with the first row that goes while tokens are generated, since the prompt's dropped
tokens never reach the decode worker; keys are merged as they are cached, each rotated to its own position; x keeps its
own score.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from decode_worker.eviction.facts import RowFacts
from decode_worker.eviction.rule import Rule, worth_of
from shared.kv.eviction import Recall


class RecallRule(Rule):
    """See the module."""

    goes_by_attention: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __init__(self, numbers: Recall, kept: np.ndarray) -> None:
        super().__init__(kept)
        self._numbers = numbers
        self._sinks = torch.from_numpy(numbers.sinks - kept)[..., None]
        self._recent = torch.tensor(numbers.recent)[:, None, None]

    def held(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`."""
        return min(kept + generated, self._numbers.budget[layer])

    def learn(self, rows: RowFacts) -> None:
        """See `Rule`."""
        rows.scores += rows.attention

    def worth(self, rows: RowFacts) -> torch.Tensor:
        """See `Rule`."""
        device = rows.arrival.device
        between = rows.arrival >= self._sinks.to(device)
        return worth_of(between & (rows.arrival < rows.generated - self._recent.to(device)), rows.scores)


def most_similar(keys: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each head the other row with the largest cosine to the one that goes, of equals the first.

    Args:
        keys: [num_kv_heads, rows, head_dim], at least two rows.
        dropped: [num_kv_heads] int64, which one goes.

    Returns:
        Its place [num_kv_heads] int64, and the cosine [num_kv_heads] fp32.
    """
    units = functional.normalize(keys.float(), dim=-1)
    own = dropped[:, None]
    cosines = (units @ units.gather(1, own[..., None].expand(-1, 1, units.shape[2])).mT)[..., 0]
    best = cosines.scatter(1, own, -torch.inf).max(dim=1)
    return best.indices, best.values


def joined(rows: torch.Tensor, cosine: torch.Tensor, joins: torch.Tensor) -> torch.Tensor:
    """What stays of two rows of each head, [num_kv_heads, head_dim] in their dtype.

    Args:
        rows: [num_kv_heads, 2, head_dim], the one that stays and the one that goes.
        cosine: [num_kv_heads] fp32.
        joins: [num_kv_heads] bool; else the first stays bit by bit.
    """
    stays, goes = rows.float().unbind(dim=1)
    merged = (stays + cosine[:, None] * goes) / 2
    return torch.where(joins[:, None], merged, stays).to(rows.dtype)
