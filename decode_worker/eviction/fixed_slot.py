"""Elastic Cache (Liu et al., ECCV 2024, arXiv 2407.18121), and PrefixKV (arXiv 2412.03409) layer by layer.

A layer that holds more than its share of all tokens seen so far drops the row in one fixed place of its cache: 25 rows
before the end of the kept prompt, or its middle where it is shorter. Since later rows move up, generated ones pass that
place in the order in which they came; no score is needed.
"""

from __future__ import annotations

import numpy as np
import torch

from decode_worker.eviction.facts import ABSENT, RowFacts
from decode_worker.eviction.rule import Rule, worth_of
from decode_worker.eviction.shares import share_of
from shared.kv.eviction import FixedSlot


class FixedSlotRule(Rule):
    """See the module."""

    def __init__(self, numbers: FixedSlot, kept: np.ndarray, prompt_tokens: int) -> None:
        super().__init__(kept)
        self._numbers = numbers
        self._prompt_tokens = prompt_tokens
        slot = np.where(kept + numbers.distance < 1, kept // 2, kept + numbers.distance)
        # arrival of the row that lies in the slot at first
        self._from = torch.from_numpy(slot - kept)[..., None]

    def held(self, layer: int, kept: int, generated: int) -> int:
        """See `Rule`; an appended row stays while the layer holds less than its share."""
        share = share_of(self._numbers.retention[layer], self._prompt_tokens + generated)
        return min(kept + generated, max(kept, share))

    def worth(self, rows: RowFacts) -> torch.Tensor:
        """See `Rule`: the first row from the slot on."""
        arrival = rows.arrival
        return worth_of((arrival >= self._from.to(arrival.device)) & (arrival < ABSENT), arrival)
