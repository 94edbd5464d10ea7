"""What is known of each row of a sequence that evicts: when it came, and what attention it got.

Rows lie where they fit, not in the order in which they came. When one goes, the last one takes its place, so what is
left stays without a gap, and the next token's row comes to lie behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

ABSENT = torch.iinfo(torch.int32).max
"""The arrival of a row that is not there."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """Rows that take the places of dropped ones: `source` to `target`, in KV heads that all differ.

    Attributes:
        heads: [number] int64, layer * num_kv_heads + head.
        layers: Those of the heads, ascending.
        source: [number] int64, rows of these heads.
        target: As `source`.
    """

    heads: torch.Tensor
    layers: tuple[int, ...]
    source: torch.Tensor
    target: torch.Tensor


@dataclass(eq=False, kw_only=True)
class RowFacts:
    """Belongs to whoever may touch the sequence's KV.

    Attributes:
        generated: Tokens appended since the prompt, wherever the sequence has been since.
        lengths: [num_layers, num_kv_heads] int64, rows present.
        arrival: [num_layers, num_kv_heads, places] int32, the order in which rows came: the prompt's end at -1,
            generated ones count from 0.
        attention: As `arrival`, fp32: what each row gets from the current token, summed over its query heads; no
            places where nobody asks.
        scores: As `attention`, accumulated.
    """

    generated: int
    lengths: np.ndarray
    arrival: torch.Tensor
    attention: torch.Tensor
    scores: torch.Tensor

    @classmethod
    def begin(cls, kept: np.ndarray, *, attention: bool, scores: np.ndarray | None) -> RowFacts:
        """A sequence that has generated nothing yet.

        Args:
            kept: [num_layers, num_kv_heads] int64, the prompt's rows.
            attention: Whether anyone asks for it.
            scores: [sum of kept] fp32, layer-major, head after head.
        """
        counts = torch.from_numpy(kept)[..., None]
        place = torch.arange(int(kept.max()))
        arrival = torch.where(place < counts, place - counts, ABSENT).int()
        nothing = torch.zeros(*kept.shape, 0)
        known = nothing
        if scores is not None:
            known = torch.zeros(arrival.shape)
            known[place < counts] = torch.from_numpy(scores.copy())
        return cls(
            generated=0,
            lengths=kept.copy(),
            arrival=arrival,
            attention=torch.zeros(arrival.shape) if attention else nothing,
            scores=known,
        )

    def settled(self, places: int, device: torch.device) -> RowFacts:
        """A copy with room for `places` rows in each KV head, which must hold those present."""
        return RowFacts(
            generated=self.generated,
            lengths=self.lengths.copy(),
            arrival=_fitted(self.arrival, places, ABSENT).to(device),
            attention=_fitted(self.attention, places, 0).to(device),
            scores=_fitted(self.scores, places, 0).to(device),
        )

    def observe(self, layer: int, attention: torch.Tensor) -> None:
        """Takes a layer's attention from the current token, [num_kv_heads, rows present] fp32."""
        self.attention[layer, :, : attention.shape[1]] = attention

    def append(self, receiving: np.ndarray) -> None:
        """Counts the rows of one more token, which lie behind the others.

        Args:
            receiving: [num_layers, num_kv_heads] bool, the KV heads that get one.
        """
        heads, places = np.flatnonzero(receiving), self.lengths[receiving]
        self.arrival.flatten(0, 1)[self._on_device(heads), self._on_device(places)] = self.generated
        self.lengths += receiving
        self.generated += 1

    def drop(self, heads: np.ndarray, worth: torch.Tensor) -> Move:
        """Drops the row with the lowest worth, of equals the oldest; the last row takes its place, here and in `worth`.

        Args:
            heads: [number] int64, layer * num_kv_heads + head.
            worth: [num_layers * num_kv_heads, places] fp64, infinity for rows that are not there.
        """
        rows = self._on_device(heads)
        last = self._on_device(self.lengths.ravel()[heads] - 1)
        arrival = self.arrival.flatten(0, 1)
        victim = _first_lowest(worth[rows], arrival[rows])
        tables = [(arrival, ABSENT), (worth, torch.inf)]
        if self.scores.shape[2]:
            tables.append((self.scores.flatten(0, 1), 0))
        for table, nothing in tables:
            table[rows, victim] = table[rows, last]
            table[rows, last] = nothing
        self.lengths.ravel()[heads] -= 1
        layers = np.unique(heads // self.lengths.shape[1])
        return Move(heads=rows, layers=tuple(layers.tolist()), source=last, target=victim)

    def check_integrity(self) -> None:
        """Asserts that every row is there once and nothing lies behind the last."""
        arrival = self.arrival.cpu()
        present = torch.arange(arrival.shape[2]) < torch.from_numpy(self.lengths)[..., None]
        assert (arrival[~present] == ABSENT).all(), "a dropped row is still known"
        assert (arrival[present] < self.generated).all(), "a row came before its token"
        ordered = arrival.sort(dim=2).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != ABSENT)
        assert not twice.any(), "a row is there twice"

    def _on_device(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers).to(self.arrival.device)


def _first_lowest(worth: torch.Tensor, arrival: torch.Tensor) -> torch.Tensor:
    """Place of each row's lowest worth, of equals the oldest; [rows, places] -> [rows] int64."""
    lowest = worth.amin(dim=1, keepdim=True)
    return arrival.masked_fill(worth != lowest, ABSENT).argmin(dim=1)


def _fitted(table: torch.Tensor, places: int, nothing: int) -> torch.Tensor:
    """A copy with so many places, unless it has none; what is cut off must be empty."""
    fitted = table.new_full((*table.shape[:2], places if table.shape[2] else 0), nothing)
    shared = min(fitted.shape[2], table.shape[2])
    fitted[..., :shared] = table[..., :shared]
    return fitted
