"""Byte arithmetic of KV against counting every byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlcache.worker.v1 import worker_pb2 as pb

from shared.errors import FailedPreconditionError
from shared.kv.layout import LIMITS, KVLayout
from shared.kv.manifest import layer_tokens
from tests.properties.layouts import layouts, ragged

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def owners(layout: KVLayout, num_kept: tuple[int, ...]) -> list[tuple[int, str, int]]:
    """(layer, K or V, head) of every byte of a body, in order, by the words of the specification."""
    return [
        (layer, half, head)
        for layer in range(layout.num_layers)
        for half in "KV"
        for head in range(layout.num_kv_heads)
        for _ in range(num_kept[layer * layout.num_kv_heads + head] * layout.head_dim * BYTES[layout.dtype])
    ]


@given(ragged())
def test_sections_tile_the_body_as_specified(case: tuple[KVLayout, tuple[int, ...]]) -> None:
    layout, num_kept = case
    expected, found = owners(layout, num_kept), []
    for section in layout.sections(num_kept):
        for half, offset, end in (
            ("K", section.key_offset, section.value_offset),
            ("V", section.value_offset, section.end),
        ):
            assert offset == len(found), "a gap or an overlap"
            for head, rows in enumerate(section.rows):
                found += [(section.layer, half, head)] * (rows * layout.row_bytes)
            assert len(found) == end
    assert found == expected
    assert layout.body_bytes(num_kept) == len(expected)


@given(layouts(), st.integers(0, 7))
def test_uncompressed_bytes_are_those_of_the_tensors(layout: KVLayout, tokens: int) -> None:
    item = np.dtype("f4" if layout.dtype == "float32" else "f2")
    cache = np.zeros((layout.num_layers, 2, layout.num_kv_heads, tokens, layout.head_dim), item)
    assert layout.full_bytes(tokens) == cache.nbytes
    heads = layout.num_layers * layout.num_kv_heads
    assert layout.body_bytes([tokens] * heads) == cache.nbytes == layout.full_bytes(tokens)
    assert layout.token_bytes == cache.nbytes // tokens if tokens else layout.token_bytes > 0


@given(ragged())
def test_the_bound_holds_for_every_body_with_that_mean(case: tuple[KVLayout, tuple[int, ...]]) -> None:
    layout, num_kept = case
    mean = -(-sum(num_kept) // len(num_kept))
    assert layout.body_bytes(num_kept) <= layout.full_bytes(mean)


@given(ragged(), st.integers(6, 50))
def test_realised_retention_is_the_share_of_bytes(case: tuple[KVLayout, tuple[int, ...]], prompt: int) -> None:
    layout, num_kept = case
    share = layout.body_bytes(num_kept) / layout.full_bytes(prompt)
    assert layout.realised_retention(num_kept, prompt) == pytest.approx(share)


@given(ragged())
def test_a_layer_holds_the_tokens_of_its_largest_head(case: tuple[KVLayout, tuple[int, ...]]) -> None:
    layout, num_kept = case
    assert layer_tokens(num_kept, layout) == [max(section.rows) for section in layout.sections(num_kept)]


@given(layouts())
def test_a_layout_round_trips(layout: KVLayout) -> None:
    assert KVLayout.from_proto(pb.KVLayout.FromString(layout.to_proto().SerializeToString())) == layout


GOOD: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "dtype": "float32"}
BAD = [
    *[{name: value} for name in ("num_layers", "num_kv_heads", "head_dim") for value in (0, 1 << 20, 2**32 - 1)],
    *[{name: limit + 1} for name, limit in zip(GOOD, LIMITS, strict=False)],
    *[{"dtype": value} for value in ("", "int8", "FLOAT32", "float64")],
]


@pytest.mark.parametrize("change", BAD)
def test_a_layout_that_no_model_has_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        KVLayout(**(GOOD | change))
    with pytest.raises(FailedPreconditionError) as caught:
        KVLayout.from_proto(pb.KVLayout(**(GOOD | change)))
    assert caught.value.reason == "KV_LAYOUT"


def test_the_limits_themselves_are_accepted() -> None:
    layers, heads, width = LIMITS
    assert KVLayout(num_layers=layers, num_kv_heads=heads, head_dim=width, dtype="float16").row_bytes == 2 * width


def test_a_known_model_has_the_known_size() -> None:
    """Qwen2.5-VL-7B in bf16: 28 layers x 2 x 4 heads x 128 x 2 bytes = 56 KiB per token."""
    layout = KVLayout(num_layers=28, num_kv_heads=4, head_dim=128, dtype="bfloat16")
    assert layout.token_bytes == 56 * 1024
