"""Where the bytes of an encoded body lie: without holes, each on its own boundary, as many as counting gives."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidRequestError
from shared.kv.encoding import ALIGNMENT, FIELD_BYTES, Encoding
from shared.kv.layout import ITEM_BYTES, KVLayout
from shared.request.params import Wire
from tests.properties.encodings import encodings
from tests.properties.layouts import ragged


def counted(encoding: Encoding, layout: KVLayout, num_kept: tuple[int, ...]) -> int:
    """The bytes of a body, added up row by row and group by group."""
    item, total, heads = ITEM_BYTES[layout.dtype], 0, layout.num_kv_heads
    for layer in range(layout.num_layers):
        for kept in num_kept[layer * heads : (layer + 1) * heads]:
            older = max(0, kept - encoding.residual)
            total += 2 * (kept - older) * layout.head_dim * item
            for columns in (encoding.key_channels, layout.head_dim):
                row = math.ceil(columns * encoding.bits / 8) if encoding.bits else columns * item
                total += older * row
            if encoding.bits:
                total += 4 * math.ceil(older / encoding.group) * encoding.key_channels
                total += 4 * older * math.ceil(layout.head_dim / encoding.group)
            if encoding.key_channels < layout.head_dim:
                total += math.ceil(layout.head_dim / 8)
        total = math.ceil(total / ALIGNMENT) * ALIGNMENT
    return total


@given(ragged(largest=100), st.data())
def test_a_body_has_as_many_bytes_as_counting_gives(
    case: tuple[KVLayout, tuple[int, ...]], data: st.DataObject
) -> None:
    layout, num_kept = case
    encoding = data.draw(encodings(layout))
    assert encoding.body_bytes(layout, num_kept) == counted(encoding, layout, num_kept)


@given(ragged(largest=100), st.data())
def test_fields_follow_each_other_on_their_own_boundaries(
    case: tuple[KVLayout, tuple[int, ...]], data: st.DataObject
) -> None:
    layout, num_kept = case
    encoding, at = data.draw(encodings(layout)), 0
    layers = list(encoding.layers(layout, num_kept))
    assert len(layers) == layout.num_layers
    for layer in layers:
        for field in layer.fields.values():
            assert field.offset == at
            assert field.offset % FIELD_BYTES[field.dtype] == 0
            at = field.end
        assert 0 <= layer.end - at < ALIGNMENT
        at = layer.end
    kept = [older + recent for layer in layers for older, recent in zip(layer.older, layer.recent, strict=True)]
    assert tuple(kept) == num_kept


@given(ragged(), st.data())
def test_an_encoding_round_trips_over_the_wire(case: tuple[KVLayout, tuple[int, ...]], data: st.DataObject) -> None:
    encoding = data.draw(encodings(case[0]))
    assert Encoding.from_proto(encoding.to_proto()) == encoding


SEVEN_B = KVLayout(num_layers=28, num_kv_heads=4, head_dim=128, dtype="bfloat16")
KEPT = (288,) * 28 * 4


def test_four_bits_take_five_sixteenths_of_the_older_rows() -> None:
    """With groups of 32 a value takes 4 bits and its share of scale and zero one more, of 16."""
    encoding = Encoding.asked_for(Wire(bits=4), SEVEN_B, KEPT)
    assert encoding == Encoding(bits=4, group=32, residual=32, key_channels=128)
    recent = SEVEN_B.full_bytes(32)
    assert encoding.body_bytes(SEVEN_B, KEPT) == recent + (SEVEN_B.body_bytes(KEPT) - recent) * 5 // 16


@pytest.mark.parametrize(
    ("share", "head_dim", "channels"), [(0.6, 128, 77), (0.07, 100, 7), (1e-9, 8, 1), (0.5, 63, 32), (1.0, 63, 63)]
)
def test_the_share_of_channels_is_rounded_up_exactly(share: float, head_dim: int, channels: int) -> None:
    """As published: floor((1 - share) * head_dim) channels are dropped."""
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=head_dim, dtype="bfloat16")
    encoding = Encoding.asked_for(Wire(bits=2, key_channels=share, residual=0), layout, (1000,))
    assert encoding is not None
    assert encoding.key_channels == channels


@pytest.mark.parametrize(
    ("wire", "kept"),
    [
        (Wire(), 1000),
        (Wire(bits=4), 32),
        (Wire(bits=8, residual=0), 2),
        (Wire(key_channels=0.999), 1000),
        (Wire(bits=2, residual=2**32 - 1), 1000),
    ],
)
def test_what_would_not_save_a_byte_is_sent_plain(wire: Wire, kept: int) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=128, dtype="bfloat16")
    assert Encoding.asked_for(wire, layout, (kept, kept)) is None


@given(ragged(largest=100), st.data())
def test_what_is_asked_for_always_passes_the_check(case: tuple[KVLayout, tuple[int, ...]], data: st.DataObject) -> None:
    layout, num_kept = case
    wire = Wire(
        bits=data.draw(st.sampled_from([0, 8, 4, 2])),
        key_channels=data.draw(st.floats(0, 1, exclude_min=True)),
        group=data.draw(st.integers(8, 256)),
        residual=data.draw(st.integers(0, 50)),
    )
    encoding = Encoding.asked_for(wire, layout, num_kept)
    if encoding is not None:
        encoding.check(layout, num_kept)


IMPOSSIBLE = [
    {"bits": 3},
    {"bits": 16},
    {"group": 0},
    {"group": 7},
    {"group": 257},
    {"residual": -1},
    {"key_channels": 0},
]


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_impossible_encodings_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Encoding(**({"bits": 4, "group": 32, "residual": 0, "key_channels": 8} | change))
    assert caught.value.reason == "PARCEL_ENCODING"


@pytest.mark.parametrize("change", [{"key_channels": 129}, {"bits": 0}, {"residual": 288}])
def test_encodings_that_do_not_suit_the_parcel_are_refused(change: dict[str, int]) -> None:
    encoding = Encoding(**({"bits": 4, "group": 32, "residual": 32, "key_channels": 128} | change))
    with pytest.raises(InvalidRequestError) as caught:
        encoding.check(SEVEN_B, KEPT)
    assert caught.value.reason == "PARCEL_ENCODING"
