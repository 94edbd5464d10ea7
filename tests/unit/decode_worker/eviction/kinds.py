"""Small numbers for each kind, so that much is dropped in few steps."""

from __future__ import annotations

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
)
from shared.kv.layout import KVLayout


def shares(layers: int) -> st.SearchStrategy[tuple[Fraction, ...]]:
    share = st.fractions(0, 1, max_denominator=12)
    return st.lists(share, min_size=layers, max_size=layers).map(tuple)


@st.composite
def parcels(draw: st.DrawFn) -> tuple[KVLayout, Eviction | None, tuple[int, ...], int]:
    """Layout, eviction, kept rows that suit it, and tokens of the prompt."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layout = KVLayout(num_layers=layers, num_kv_heads=heads, head_dim=draw(st.sampled_from([3, 8])), dtype="float32")
    counts = st.integers(1, 9)
    kind = draw(st.sampled_from(["none", "slot", "heavy", "recall", "scope", "guard", "sparse", "shared"]))
    if kind in ("guard", "recall"):
        kept = [count for count in draw(st.lists(counts, min_size=layers, max_size=layers)) for _ in range(heads)]
    elif kind == "sparse":
        kept = [draw(counts)] * (layers * heads)
    else:
        kept = draw(st.lists(counts, min_size=layers * heads, max_size=layers * heads))
    prompt_tokens = max(kept) + draw(st.integers(0, 30))
    eviction = draw(shared_layers(layers)) if kind == "shared" else draw(evictions(kind, layers, max(kept)))
    empty = eviction.empty_layers if eviction is not None else ()
    kept = [0 if place // heads in empty else count for place, count in enumerate(kept)]
    return layout, eviction, tuple(kept), prompt_tokens


@st.composite
def shared_layers(draw: st.DrawFn, layers: int) -> SharedLayers | None:
    """None where a model has one layer."""
    borrowers = sorted(draw(st.sets(st.integers(1, layers - 1), min_size=1))) if layers > 1 else []
    lenders = [draw(st.sampled_from([low for low in range(high) if low not in borrowers])) for high in borrowers]
    return SharedLayers(borrowers=tuple(borrowers), lenders=tuple(lenders)) if borrowers else None


@st.composite
def evictions(draw: st.DrawFn, kind: str, layers: int, most_kept: int) -> Eviction | None:
    recent = draw(st.integers(1, 4))
    match kind:
        case "slot":
            return FixedSlot(retention=draw(shares(layers)), distance=-draw(st.integers(1, 6)))
        case "heavy":
            budget = most_kept + draw(st.integers(0, 3))
            return HeavyHitters(budget=budget, recent=draw(st.integers(0, budget)))
        case "recall":
            budget = tuple(most_kept + draw(st.integers(1, 4)) for _ in range(layers))
            some = tuple(draw(st.integers(0, rows - 1)) for rows in budget)
            spare = min(rows - stay for rows, stay in zip(budget, some, strict=True))
            return Recall(budget=budget, recent=some, sinks=draw(st.integers(0, spare - 1)))
        case "scope":
            return Scope(
                variant=draw(st.sampled_from(SCOPE_VARIANTS)),
                window=recent + draw(st.integers(0, 4)),
                recent=recent,
                delta=draw(st.integers(1, 4)),
            )
        case "guard":
            text = tuple(draw(st.lists(st.integers(0, 4), min_size=layers, max_size=layers)))
            return TextGuard(retention=draw(shares(layers)), sinks=draw(st.integers(0, 4)), text=text)
        case "sparse":
            select = draw(st.sets(st.integers(0, layers), min_size=1, max_size=layers))
            return SparseRead(select_layers=tuple(sorted(select)), top=draw(st.integers(1, 8)))
    return None
