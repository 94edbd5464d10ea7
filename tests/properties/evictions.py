"""Strategies for what a parcel says of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from hypothesis import strategies as st

from shared.kv.eviction import (
    SCOPE_VARIANTS,
    Eviction,
    FixedSlot,
    HeavyHitters,
    Recall,
    Scope,
    SharedLayers,
    SparseRead,
    TextGuard,
    share_that_travels,
)
from shared.kv.layout import KVLayout


def shares() -> st.SearchStrategy[Fraction]:
    """Whatever a request may ask for."""
    return st.floats(0, 1, exclude_min=True).map(lambda share: share_that_travels(Fraction(str(share))))


@st.composite
def evictions(draw: st.DrawFn, layout: KVLayout, num_kept: Sequence[int]) -> Eviction | None:
    """Any kind that suits the kept rows."""
    retention = tuple(draw(shares()) for _ in range(layout.num_layers))
    recent = draw(st.integers(1, 40))
    text = tuple(draw(st.integers(0, 20)) for _ in range(layout.num_layers))
    kinds: list[Eviction | None] = [
        None,
        FixedSlot(retention=retention, distance=-draw(st.integers(1, 40))),
        HeavyHitters(budget=max(num_kept) + recent, recent=recent),
        Scope(
            variant=draw(st.sampled_from(SCOPE_VARIANTS)),
            window=recent + draw(st.integers(0, 40)),
            recent=recent,
            delta=draw(st.integers(1, 20)),
        ),
    ]
    heads = layout.num_kv_heads
    if empty := [layer for layer in range(layout.num_layers) if not any(num_kept[layer * heads : (layer + 1) * heads])]:
        lenders = [draw(st.sampled_from([low for low in range(high) if low not in empty])) for high in empty]
        return SharedLayers(borrowers=tuple(empty), lenders=tuple(lenders))
    if all(len(set(num_kept[at : at + heads])) == 1 for at in range(0, len(num_kept), heads)):
        kinds.append(TextGuard(retention=retention, sinks=draw(st.integers(0, 5)), text=text))
        budget = tuple(max(num_kept) + recent + 6 for _ in range(layout.num_layers))
        kinds.append(Recall(budget=budget, recent=(recent,) * layout.num_layers, sinks=draw(st.integers(0, 5))))
    if len(set(num_kept)) == 1:
        select = tuple(sorted(draw(st.sets(st.integers(0, 50), min_size=1, max_size=layout.num_layers))))
        kinds.append(SparseRead(select_layers=select, top=recent))
    return draw(st.sampled_from(kinds))
