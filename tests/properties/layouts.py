"""Strategies for KV layouts and ragged parcels."""

from __future__ import annotations

from hypothesis import strategies as st

from shared.kv.layout import ITEM_BYTES, KVLayout


def layouts() -> st.SearchStrategy[KVLayout]:
    return st.builds(
        KVLayout,
        num_layers=st.integers(1, 5),
        num_kv_heads=st.integers(1, 4),
        head_dim=st.integers(1, 9),
        dtype=st.sampled_from(sorted(ITEM_BYTES)),
    )


@st.composite
def ragged(draw: st.DrawFn, largest: int = 6) -> tuple[KVLayout, tuple[int, ...]]:
    """A layout and one kept count per layer and KV head."""
    layout = draw(layouts())
    heads = layout.num_layers * layout.num_kv_heads
    return layout, tuple(draw(st.lists(st.integers(1, largest), min_size=heads, max_size=heads)))
