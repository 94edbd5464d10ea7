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
    """Owner of the row facts. Belongs to whoever may touch the sequence's KV: the step thread, or a copy."""

    rule: Rule
    rows: RowFacts

    @classmethod
    def begin(cls, rule: Rule, scores: np.ndarray | None = None) -> RowLedger:
        """A sequence that has generated nothing yet; see `RowFacts.begin`."""
        return cls(rule=rule, rows=RowFacts.begin(rule.kept, attention=rule.goes_by_attention, scores=scores))

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
        return RowLedger(rule=self.rule, rows=self.rows.settled(places, device))

    def observe(self, layer: int, attention: torch.Tensor) -> torch.Tensor | None:
        """Takes the current token's attention in a watched layer; returns what the layers after it read.

        Args:
            attention: [num_kv_heads, rows] fp32, the new row included; 0 for rows that are not there.
        """
        if self.rule.goes_by_attention:
            self.rows.observe(layer, attention)
        return self.rule.select(attention)

    def step(self) -> Iterator[Move]:
        """Counts the step's rows, then drops what has to go; each move must be made before the next one."""
        self.rows.append()
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
