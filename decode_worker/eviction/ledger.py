"""A sequence's rule together with the rows that it has judged so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from decode_worker.eviction.facts import Move, RowFacts
from decode_worker.eviction.rule import Rule


@dataclass(eq=False, kw_only=True)
class RowLedger:
    """Owner of the row facts. Belongs to whoever may touch the sequence's KV: the step thread, or a copy.

    Attributes:
        thresholds: [num_layers] fp32, the cosine from which on a row that goes joins another; not a number in layers
            that have dropped none yet.
    """

    rule: Rule
    rows: RowFacts
    thresholds: torch.Tensor

    @classmethod
    def begin(cls, rule: Rule, scores: np.ndarray | None = None) -> RowLedger:
        """A sequence that has generated nothing yet; see `RowFacts.begin`."""
        rows = RowFacts.begin(rule.kept, attention=rule.goes_by_attention, scores=scores)
        return cls(rule=rule, rows=rows, thresholds=torch.full(rule.kept.shape[:1], torch.nan))

    @property
    def lengths(self) -> np.ndarray:
        """[num_layers, num_kv_heads] int64, rows present."""
        return self.rows.lengths

    def growth(self, tokens: int) -> list[int]:
        """Rows by which each KV head may grow at most while `tokens` come, layer-major."""
        grown = self.rule.most_rows(self.rows.generated + tokens) - self.lengths
        return np.maximum(grown, 0).ravel().tolist()

    def settled(self, places: int, device: torch.device) -> RowLedger:
        """A copy with room for `places` rows in each KV head, which must hold those present."""
        thresholds = self.thresholds.to(device, copy=True)
        return RowLedger(rule=self.rule, rows=self.rows.settled(places, device), thresholds=thresholds)

    def observe(self, layer: int, attention: torch.Tensor) -> torch.Tensor | None:
        """Takes the current token's attention in a watched layer; returns what the layers after it read.

        Args:
            attention: [num_kv_heads, rows] fp32, the new row included; 0 for rows that are not there.
        """
        if self.rule.goes_by_attention:
            self.rows.observe(layer, attention)
        return self.rule.select(attention)

    def joins(self, layer: int, cosines: torch.Tensor) -> torch.Tensor:
        """Which rows that go join another, [num_kv_heads] bool; moves the layer's threshold.

        Args:
            cosines: [num_kv_heads] fp32, with the rows that they would join.
        """
        before, mean = self.thresholds[layer], cosines.mean()
        self.thresholds[layer] = torch.where(before.isnan(), mean, (before + mean) / 2)
        return cosines >= self.thresholds[layer]

    def step(self) -> Iterator[Move]:
        """Counts the step's rows, then drops what has to go; each move must be made before the next one."""
        self.rows.append(self.rule.own_rows)
        self.rule.learn(self.rows)
        surplus = (self.lengths - self.rule.held_rows(self.rows.generated)).ravel()
        if surplus.any():
            worth = self.rule.worth(self.rows).flatten(0, 1)
            for already in range(surplus.max()):
                yield self.rows.drop(np.flatnonzero(surplus > already), worth)

    def check_integrity(self) -> None:
        """Asserts that every KV head holds as many rows as its rule says, and that they are known."""
        assert (self.lengths == self.rule.held_rows(self.rows.generated)).all(), "rows were lost"
        self.rows.check_integrity()
