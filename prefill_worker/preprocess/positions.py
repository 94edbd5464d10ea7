"""Rotary positions of a prompt's tokens, as transformers' models compute them. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
"""[axes, num_tokens]; axes are 1, or 3: time, height and width."""


def plain_positions(num_tokens: int) -> Positions:
    """One position after the other, [1, num_tokens]."""
    return np.arange(num_tokens)[None]


def grid_positions(visual: NDArray[np.bool_], grids: Sequence[tuple[int, int]]) -> Positions:
    """M-RoPE, [3, num_tokens]: text goes on in all axes, an image stands still in time and spreads in the others.

    The token after an image of h x w is max(h, w) behind its first one.

    Args:
        visual: [num_tokens] bool.
        grids: Rows and columns of visual tokens of each image, which lie in a row.

    Raises:
        ValueError: The images have another number of tokens.
    """
    places = np.flatnonzero(visual)
    if len(places) != sum(rows * columns for rows, columns in grids):
        raise ValueError(f"{len(places)} visual tokens for images of {list(grids)}")
    pieces, done, taken, position = list[Positions](), 0, 0, 0
    for rows, columns in grids:
        first = int(places[taken])
        pieces.append(_text(position, first - done))
        position += first - done
        pieces.append(position + _image(rows, columns))
        position += max(rows, columns)
        taken, done = taken + rows * columns, first + rows * columns
    pieces.append(_text(position, len(visual) - done))
    return np.concatenate(pieces, axis=1)


def _text(first: int, count: int) -> Positions:
    return np.tile(np.arange(first, first + count), (3, 1))


def _image(rows: int, columns: int) -> Positions:
    down, across = np.indices((rows, columns)).reshape(2, -1)
    return np.stack([np.zeros_like(down), down, across])
