"""Brings the rows of a parcel into the order in which they travel in waves (`shared/kv/waves.py`), and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest
from shared.kv.waves import LAST_WAVE, travelling_bytes


def last_wave(body: memoryview, layout: KVLayout, num_kept: Sequence[int], waves: bytes) -> memoryview:
    """The rows of a body that did not leave early, in the order in which they travel; a copy.

    Args:
        waves: Of each row, entries as the K rows of the body.
    """
    last = waves.count(LAST_WAVE)
    order = _body_rows(layout, num_kept, waves)[2 * (len(waves) - last) :]
    return _rows(body, layout, len(waves)).take(order, axis=0).reshape(-1).data


def in_body_order(manifest: Manifest, travelled: memoryview) -> memoryview:
    """The body of a parcel that left in waves, in memory of its own.

    Args:
        manifest: Checked and without an encoding.
        travelled: `travelling_bytes` long.
    """
    assert len(travelled) == travelling_bytes(manifest)
    layout, num_rows = manifest.layout, sum(manifest.num_kept)
    order = _body_rows(layout, manifest.num_kept, travelled[manifest.body_bytes :])
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    body = np.empty(manifest.body_bytes, dtype=np.uint8)
    # not "raise", which would write to a buffer first
    rows = _rows(travelled, layout, num_rows)
    rows.take(places, axis=0, out=_rows(body.data, layout, num_rows), mode="clip")
    body[manifest.kv_bytes :] = np.frombuffer(travelled[manifest.kv_bytes : manifest.body_bytes], dtype=np.uint8)
    return body.data


def _rows(body: memoryview, layout: KVLayout, num_rows: int) -> np.ndarray:
    """A view of the K and V rows that a body begins with, [2 x num_rows, row bytes]."""
    nbytes = 2 * num_rows * layout.row_bytes
    return np.frombuffer(body[:nbytes], dtype=np.uint8).reshape(-1, layout.row_bytes)


def _body_rows(layout: KVLayout, num_kept: Sequence[int], waves: bytes | memoryview) -> np.ndarray:
    """Of each row on its way which one of the body it is, [2 x len(waves)] int64."""
    key_waves = np.frombuffer(waves, dtype=np.uint8)
    heads = layout.num_kv_heads
    ends = np.cumsum([sum(num_kept[first : first + heads]) for first in range(0, len(num_kept), heads)])
    # values follow the keys of their layer
    both = [part for layer in np.split(key_waves, ends[:-1]) for part in (layer, layer)]
    return np.concatenate(both).argsort(kind="stable")
