"""Rotary positions of a prompt's tokens, as transformers' models compute them. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
"""[axes, num_tokens]; axes are 1, or 3: time, height and width."""


class Block(NamedTuple):
    """Visual tokens that lie in a row: `rows` x `columns` at each of `times`, which count from where they begin."""

    times: tuple[int, ...]
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all times."""
        return len(self.times) * self.rows * self.columns


def plain_positions(num_tokens: int) -> Positions:
    """One position after the other, [1, num_tokens]."""
    return np.arange(num_tokens)[None]


def block_positions(visual: NDArray[np.bool_], blocks: Sequence[Block]) -> Positions:
    """M-RoPE, [3, num_tokens]: text goes on in all axes, an image stands still in time and spreads in the others.

    The token after a block of h x w is max(h, w) behind its first one, however long that took.

    Args:
        visual: [num_tokens] bool.
        blocks: Of the images and videos, in their order.

    Raises:
        ValueError: They have another number of tokens.
    """
    places = np.flatnonzero(visual)
    if len(places) != sum(block.num_tokens for block in blocks):
        raise ValueError(f"{len(places)} visual tokens for {list(blocks)}")
    pieces, done, taken, position = list[Positions](), 0, 0, 0
    for block in blocks:
        first = int(places[taken])
        pieces.append(_text(position, first - done))
        position += first - done
        pieces.append(position + _visual(block))
        position += max(block.rows, block.columns)
        taken, done = taken + block.num_tokens, first + block.num_tokens
    pieces.append(_text(position, len(visual) - done))
    return np.concatenate(pieces, axis=1)


def _text(first: int, count: int) -> Positions:
    return np.tile(np.arange(first, first + count), (3, 1))


def _visual(block: Block) -> Positions:
    step, down, across = np.indices((len(block.times), block.rows, block.columns)).reshape(3, -1)
    return np.stack([np.array(block.times)[step], down, across])
