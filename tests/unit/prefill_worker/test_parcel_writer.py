"""The body of a parcel against plain indexing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.pipeline import Selection, keep_everything
from prefill_worker.engine.engine import Prefilled
from prefill_worker.parcel.writer import kept_counts, write_body
from shared.kv.arena import Arena
from shared.kv.layout import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prefilled(layout: KVLayout, tokens: int) -> Prefilled:
    generator = torch.Generator().manual_seed(tokens)
    shape = (layout.num_kv_heads, tokens, layout.head_dim)
    tensors = [torch.randn(shape, generator=generator).to(DTYPES[layout.dtype]) for _ in range(2 * layout.num_layers)]
    return Prefilled(logits=torch.zeros(1), keys=tensors[::2], values=tensors[1::2], measured=[], seconds={})


def selection(kept: list[list[int]], tokens: int) -> Selection:
    chosen = torch.zeros(len(kept), tokens, dtype=torch.bool)
    for head, places in enumerate(kept):
        chosen[head, places] = True
    return Selection(chosen=chosen, attention_mass=1.0)


def written(source: Prefilled, selections: list[Selection], layout: KVLayout) -> bytes:
    """What lies in an arena's slot afterwards; every byte around it must be untouched."""
    counts = kept_counts(source, selections)
    size = layout.body_bytes(counts)
    arena = Arena(size + 256)
    slot = arena.allocate(size + 128)
    assert slot is not None
    room = arena.view(slot, size + 128)
    room[:] = b"\xa5" * len(room)
    write_body(source, selections, counts, layout, room[:size])
    assert bytes(room[size:]) == b"\xa5" * 128
    body = bytes(room[:size])
    arena.close()
    return body


def expected(source: Prefilled, selections: list[Selection]) -> bytes:
    pieces = []
    for keys, values, chosen in zip(source.keys, source.values, selections, strict=True):
        for tensor in (keys, values):
            for head, rows in enumerate(tensor):
                pieces.append(rows if chosen.chosen is None else rows[chosen.chosen[head]])
    return b"".join(piece.contiguous().view(torch.uint8).numpy().tobytes() for piece in pieces)


@st.composite
def cases(draw: st.DrawFn) -> tuple[KVLayout, int, list[Selection]]:
    layout = KVLayout(
        num_layers=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 3, 8, 63])),
        dtype=draw(st.sampled_from([*DTYPES])),
    )
    tokens = draw(st.integers(1, 70))
    selections = []
    for _ in range(layout.num_layers):
        heads = st.sets(st.integers(0, tokens - 1), min_size=1).map(sorted)
        selections.append(selection([draw(heads) for _ in range(layout.num_kv_heads)], tokens))
    return layout, tokens, selections


@given(case=cases())
def test_the_body_is_what_indexing_gives(case: tuple[KVLayout, int, list[Selection]]) -> None:
    layout, tokens, selections = case
    source = prefilled(layout, tokens)
    assert written(source, selections, layout) == expected(source, selections)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 100, 1000])
def test_retention_one_writes_everything(dtype: str, tokens: int) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype=dtype)
    source = prefilled(layout, tokens)
    body = written(source, keep_everything(2), layout)
    assert body == expected(source, keep_everything(2))
    assert len(body) == layout.full_bytes(tokens)


def test_layers_and_heads_may_keep_different_counts() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="bfloat16")
    source = prefilled(layout, 9)
    selections = [selection([[0, 4, 8], [1, 2, 3]], 9), selection([[7], [0, 3]], 9)]
    assert kept_counts(source, selections) == (3, 3, 1, 2)
    assert written(source, selections, layout) == expected(source, selections)


def test_a_model_s_strided_cache_is_written_in_order() -> None:
    """transformers hands out transposed views; the parcel is contiguous."""
    layout = KVLayout(num_layers=1, num_kv_heads=3, head_dim=4, dtype="float32")
    strided = torch.randn(11, 3, 4).transpose(0, 1)
    source = Prefilled(logits=torch.zeros(1), keys=[strided], values=[strided * 2], measured=[], seconds={})
    for selections in ([selection([[0, 5], [2, 10], [3, 4]], 11)], keep_everything(1)):
        assert written(source, selections, layout) == expected(source, selections)


def test_merged_rows_take_the_place_of_the_tokens_they_were_merged_into() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="bfloat16")
    source = prefilled(layout, 9)
    plain = [selection([[0, 4, 8], [1, 2, 3]], 9), selection([[7], [0, 3]], 9)]
    keys, values = torch.randn(2, 3, 4).bfloat16()
    merged = [plain[0], replace(plain[1], merged=(keys, values))]
    body, unmerged = written(source, merged, layout), written(source, plain, layout)
    tail = torch.cat([keys, values]).view(torch.uint8).numpy().tobytes()
    assert body == unmerged[: -len(tail)] + tail
