"""Strategies for encoded parcels."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from shared.kv.encoding import Encoding
from shared.kv.layout import KVLayout
from shared.request.params import WIRE_BITS, WIRE_GROUPS


def encodings(layout: KVLayout) -> st.SearchStrategy[Encoding]:
    """Any, whether it makes a parcel smaller or not."""
    return st.builds(
        Encoding,
        bits=st.sampled_from(WIRE_BITS),
        group=st.integers(*WIRE_GROUPS),
        residual=st.integers(0, 40),
        key_channels=st.integers(1, layout.head_dim),
    )


def saving(layout: KVLayout, num_kept: Sequence[int]) -> st.SearchStrategy[Encoding | None]:
    """One that makes the parcel smaller, or none."""

    def or_none(encoding: Encoding) -> Encoding | None:
        smaller = encoding.body_bytes(layout, num_kept) < layout.body_bytes(num_kept)
        return encoding if smaller else None

    return st.none() | encodings(layout).map(or_none)
