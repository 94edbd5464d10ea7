"""Queries of a prompt's earlier pieces, as far as statistics look at them: the keys that they need come later."""

from __future__ import annotations

from typing import NamedTuple

import torch


class _Rows(NamedTuple):
    """Attention rows of one layer that follow each other.

    Attributes:
        first: Position of the first one.
        query: [num_query_heads, rows, head_dim].
        mask: [rows, keys so far] bool, which keys each sees; None where these are itself and all before it.
    """

    first: int
    query: torch.Tensor
    mask: torch.Tensor | None


class HeldRows:
    """Owner of these queries, from a piece to the last one. In the model thread.

    Args:
        first_row: The first position that anybody looks at.
    """

    def __init__(self, first_row: int) -> None:
        self._first_row = first_row
        self._rows: dict[int, list[_Rows]] = {}

    def hold(self, layer: int, query: torch.Tensor, mask: torch.Tensor | None, end: int) -> None:
        """Keeps what will be looked at of a piece's queries [num_query_heads, rows, head_dim].

        Args:
            mask: [rows, end] bool, as `_Rows`.
            end: Position behind the last one.
        """
        first = max(self._first_row, end - query.shape[1])
        if first < end:
            # a view would keep what it was cut from
            rows = _Rows(first, query[:, first - end :].clone(), None if mask is None else mask[first - end :].clone())
            self._rows.setdefault(layer, []).append(rows)

    def join(
        self, layer: int, query: torch.Tensor, mask: torch.Tensor | None, end: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Lets go of a layer's rows: these before those of the last piece, all over `end` keys."""
        rows = [*self._rows.pop(layer, ()), _Rows(end - query.shape[1], query, mask)]
        joined = torch.cat([each.query for each in rows], dim=1)
        if all(each.mask is None for each in rows):
            return joined, None
        return joined, torch.cat([_over(each, end) for each in rows])


def _over(rows: _Rows, num_keys: int) -> torch.Tensor:
    """[rows, num_keys] bool: keys of later pieces are seen by none of them."""
    if rows.mask is not None:
        return torch.nn.functional.pad(rows.mask, (0, num_keys - rows.mask.shape[1]), value=False)
    positions = torch.arange(num_keys, device=rows.query.device)
    return positions <= positions[rows.first : rows.first + rows.query.shape[1], None]
