"""What a manifest says of layers with a window is believed only as far as it can be true."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlcache.worker.v1 import kv_pb2 as pb

from shared.errors import DataLossError, FailedPreconditionError, InvalidRequestError
from shared.kv.eviction import FixedSlot, HeavyHitters
from shared.kv.layout import MAX_WINDOW, KVLayout
from shared.kv.manifest import Manifest, body_digest, score_bytes
from tests.unit.decode_worker.sighted import SightedRows, some_seen

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=2, dtype="float32", windows=(10, 0, 4))
ROWS = SightedRows(LAYOUT, 30, some_seen(LAYOUT, 30, 1), 0)
EXAMPLE = ROWS.manifest()


@st.composite
def prompts(draw: st.DrawFn) -> SightedRows:
    windows = draw(st.lists(st.sampled_from([0, 2, 8, 9, 10, 33]), min_size=1, max_size=4).filter(any))
    layout = replace(LAYOUT, num_layers=len(windows), windows=tuple(windows))
    length = draw(st.integers(1, 40))
    return SightedRows(layout, length, some_seen(layout, length, draw(st.integers(0, 99))), 0)


@given(prompts())
def test_it_round_trips_over_the_wire(rows: SightedRows) -> None:
    manifest = rows.manifest()
    assert Manifest.from_proto(pb.KVManifest.FromString(manifest.to_proto().SerializeToString())) == manifest


def with_bitmap(number: int, bitmap: bytes) -> list[bytes]:
    return [bitmap if index == number else each for index, each in enumerate(EXAMPLE.seen_tokens)]


def moved(number: int, kept: int) -> dict[str, Any]:
    counts = [kept if index == number else each for index, each in enumerate(EXAMPLE.num_kept)]
    return {"num_kept": counts, "body_bytes": LAYOUT.body_bytes(counts)}


HOSTILE: dict[str, dict[str, Any]] = {
    "nothing about its windows": {"seen_tokens": []},
    "too few heads": {"seen_tokens": EXAMPLE.seen_tokens[:3]},
    "too many heads": {"seen_tokens": [*EXAMPLE.seen_tokens, b"\x01"]},
    "a bitmap too short": {"seen_tokens": with_bitmap(0, b"\x01")},
    "an enormous bitmap": {"seen_tokens": with_bitmap(0, EXAMPLE.seen_tokens[0] + bytes(1 << 20))},
    "a token behind the last": {"seen_tokens": with_bitmap(3, b"\x0f")},
    "another number of rows": {"seen_tokens": with_bitmap(2, b"\x00")},
    "more rows than a window shows": moved(5, 20),
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_what_cannot_be_true_is_an_invalid_request(fields: dict[str, Any]) -> None:
    message = EXAMPLE.to_proto()
    for name, value in fields.items():
        message.ClearField(name)
        if isinstance(value, list | tuple):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    with pytest.raises(InvalidRequestError, match="bad parcel manifest"):
        Manifest.from_proto(message)


def test_where_no_layer_has_a_window_nothing_is_said() -> None:
    message = EXAMPLE.to_proto()
    del message.layout.windows[:]
    with pytest.raises(InvalidRequestError, match="one bitmap per windowed layer"):
        Manifest.from_proto(message)


@pytest.mark.parametrize("eviction", [HeavyHitters(budget=90, recent=1), FixedSlot(retention=(), distance=-1)])
def test_rows_that_must_stay_in_order_are_not_evicted(eviction: Any) -> None:
    with pytest.raises(InvalidRequestError, match="nothing is evicted"):
        ROWS.manifest(eviction=eviction, body_bytes=EXAMPLE.kv_bytes + score_bytes(eviction, ROWS.num_kept)).check()


@pytest.mark.parametrize("windows", [[10], [0, 0, 0], [1, 0, 4], [MAX_WINDOW + 1, 0, 0]])
def test_windows_that_no_model_has_are_refused(windows: list[int]) -> None:
    message = EXAMPLE.to_proto()
    message.layout.ClearField("windows")
    message.layout.windows.extend(windows)
    with pytest.raises(FailedPreconditionError):
        Manifest.from_proto(message)


def test_other_windows_make_another_model() -> None:
    with pytest.raises(FailedPreconditionError):
        EXAMPLE.check_compatible(compatibility="same", layout=replace(LAYOUT, windows=(10, 0, 5)))


def test_the_digest_covers_what_is_seen() -> None:
    body = ROWS.body
    manifest = replace(EXAMPLE, digest=body_digest(body, EXAMPLE.seen_tokens))
    manifest.check_digest(body)
    turned = bytes([EXAMPLE.seen_tokens[0][0] ^ 3]) + EXAMPLE.seen_tokens[0][1:]
    with pytest.raises(DataLossError):
        replace(manifest, seen_tokens=(turned, *EXAMPLE.seen_tokens[1:])).check_digest(body)


def test_tokens_that_were_decoded_ahead_may_have_left_a_window() -> None:
    kept = [[*range(20, 30)] if layer == 1 else [*range(31 - window, 30)] for layer, window in enumerate((10, 0, 4))]
    rows = SightedRows(LAYOUT, 30, [tokens for tokens in kept for _ in range(2)], 0)
    rows.manifest(generated=(1,) * 11).check()
    with pytest.raises(InvalidRequestError, match="as many rows as tokens that were fed"):
        rows.manifest(generated=(1,) * 12).check()
