"""A parcel body as two: each KV head's first rows, which several sequences may read, and what comes after them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.kv.layout import KVLayout

Counts = Sequence[int] | np.ndarray
"""Rows per layer and KV head, layer-major."""


def divided(layout: KVLayout, num_kept: Counts, body: memoryview, first: Counts) -> tuple[memoryview, memoryview]:
    """The bodies of the `first` rows of each head, and of its other rows; copies, but where one of them is empty."""
    rest = np.ravel(num_kept) - np.ravel(first)
    if not rest.any():
        return body, memoryview(b"")
    rows = np.frombuffer(body, dtype=np.uint8).reshape(-1, layout.row_bytes)
    belongs = first_rows(layout, first, rest)
    return rows[belongs].reshape(-1).data, rows[~belongs].reshape(-1).data


def joined(layout: KVLayout, first: Counts, body: memoryview, rest: Counts, rest_body: memoryview) -> memoryview:
    """The body whose parts these are."""
    belongs = first_rows(layout, first, rest)
    rows = np.empty((len(belongs), layout.row_bytes), dtype=np.uint8)
    for part, where in ((body, belongs), (rest_body, ~belongs)):
        rows[where] = np.frombuffer(part, dtype=np.uint8).reshape(-1, layout.row_bytes)
    return rows.reshape(-1).data


def first_rows(layout: KVLayout, first: Counts, rest: Counts) -> np.ndarray:
    """Which rows of a body are each head's first ones, [rows] bool."""
    heads = np.stack([np.ravel(first), np.ravel(rest)], axis=1).reshape(layout.num_layers, 1, layout.num_kv_heads, 2)
    # K and V of a layer are alike
    counts = np.repeat(heads, 2, axis=1).ravel()
    return np.repeat(np.tile([True, False], len(counts) // 2), counts)
