"""Encoded bodies against a twin that knows only loops, the format's text and numpy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidRequestError
from shared.kv.encoding import Encoding
from shared.kv.layout import KVLayout
from shared.model.kv_codec import MAX_MAGNITUDE, decode, encode, fits, pack_codes, unpack_codes
from shared.model.spec import TORCH_DTYPES
from tests.properties.encodings import encodings
from tests.properties.layouts import ragged

UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
HALF_ROUNDOFF, HALF_TINY = 2.0**-11, 2.0**-25


def some_rows(layout: KVLayout, num_kept: Sequence[int], scale: float = 3.0) -> torch.Tensor:
    """Channels differ in size and centre, as those of K do."""
    generator = torch.Generator().manual_seed(sum(num_kept))
    noise, size, centre = (
        torch.randn(count, layout.head_dim, generator=generator) for count in (2 * sum(num_kept), 1, 1)
    )
    return ((noise * size + centre) * scale).to(TORCH_DTYPES[layout.dtype])


def some_channels(layout: KVLayout, encoding: Encoding) -> torch.Tensor | None:
    """Other channels in every layer and head."""
    if encoding.key_channels == layout.head_dim:
        return None
    shape = (layout.num_layers, layout.num_kv_heads, layout.head_dim)
    order = torch.rand(shape, generator=torch.Generator().manual_seed(1)).argsort(dim=2)
    return order < encoding.key_channels


def encoded(
    rows: torch.Tensor, layout: KVLayout, num_kept: Sequence[int], encoding: Encoding, channels: torch.Tensor | None
) -> torch.Tensor:
    body = torch.full((encoding.body_bytes(layout, num_kept),), 0xA5, dtype=torch.uint8)
    encode(rows, layout, num_kept, encoding, channels, body)
    return body


def decoded(body: torch.Tensor, layout: KVLayout, num_kept: Sequence[int], encoding: Encoding) -> torch.Tensor:
    rows = torch.full((2 * sum(num_kept), layout.head_dim), torch.nan, dtype=TORCH_DTYPES[layout.dtype])
    decode(body, layout, num_kept, encoding, rows)
    return rows


def heads_of(rows: torch.Tensor, layout: KVLayout, num_kept: Sequence[int]) -> Iterator[tuple[int, int, int, slice]]:
    """Layer, part (0 is K), head, and where its rows are."""
    at = 0
    for layer in range(layout.num_layers):
        for part in range(2):
            for head in range(layout.num_kv_heads):
                kept = num_kept[layer * layout.num_kv_heads + head]
                yield layer, part, head, slice(at, at + kept)
                at += kept


def grid(group: np.ndarray, bits: int) -> tuple[np.float32, np.float32]:
    low, high = np.float32(group.min()), np.float32(group.max())
    return np.float32(np.float16((high - low) / np.float32(2**bits - 1))), np.float32(np.float16(low))


def restored_one(value: np.float32, scale: np.float32, zero: np.float32, bits: int) -> np.float32:
    code = 0 if scale == 0 else min(2**bits - 1, max(0, round(float((value - zero) / scale))))
    return zero + np.float32(code) * scale


def twin(
    rows: torch.Tensor, layout: KVLayout, num_kept: Sequence[int], encoding: Encoding, channels: torch.Tensor | None
) -> np.ndarray:
    """What a decode worker must end up with, value by value, in fp32 before the model's dtype."""
    plain = rows.float().numpy()
    wanted, size, bits = plain.copy(), encoding.group, encoding.bits
    for layer, part, head, where in heads_of(rows, layout, num_kept):
        older = range(where.start, max(where.start, where.stop - encoding.residual))
        for channel in range(layout.head_dim):
            if part == 0 and channels is not None and not channels[layer, head, channel]:
                wanted[list(older), channel] = 0
                continue
            for row in older if bits else ():
                if part == 0:
                    first = row - (row - older.start) % size
                    members = plain[first : min(first + size, older.stop), channel]
                else:
                    members = plain[row, channel - channel % size :][:size]
                wanted[row, channel] = restored_one(plain[row, channel], *grid(members, bits), bits)
    return wanted


SHAPES = [
    (rows, head_dim, dtype)
    for rows, head_dim in [(1, 8), (31, 32), (33, 63), (100, 8), (33, 128), (100, 32), (64, 128)]
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("bits", [8, 4, 2, 0])
@pytest.mark.parametrize(("kept", "head_dim", "dtype"), SHAPES)
def test_a_round_trip_gives_what_loops_give(kept: int, head_dim: int, dtype: str, bits: int) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    num_kept = (kept, max(1, kept - 5))
    for residual, share in ((0, 1.0), (32, 0.6), (3, 0.6)):
        encoding = Encoding(bits=bits, group=32, residual=residual, key_channels=-(-head_dim * int(share * 10) // 10))
        rows, channels = some_rows(layout, num_kept), some_channels(layout, encoding)
        found = decoded(encoded(rows, layout, num_kept, encoding, channels), layout, num_kept, encoding)
        wanted = torch.from_numpy(twin(rows, layout, num_kept, encoding, channels))
        # a product and a sum may be rounded once or twice
        torch.testing.assert_close(
            found.float(), wanted.to(found.dtype).float(), rtol=2 * UNIT_ROUNDOFF[dtype], atol=1e-6
        )


@given(ragged(largest=40), st.data())
def test_any_parcel_gives_what_loops_give(case: tuple[KVLayout, tuple[int, ...]], data: st.DataObject) -> None:
    """Ragged heads, any group; nothing else is touched, and nothing of the buffer's past is sent."""
    layout, num_kept = case
    encoding = data.draw(encodings(layout))
    rows, channels = some_rows(layout, num_kept), some_channels(layout, encoding)
    before = rows.clone()
    body = encoded(rows, layout, num_kept, encoding, channels)
    assert torch.equal(rows, before)
    blank = torch.zeros_like(body)
    encode(rows, layout, num_kept, encoding, channels, blank)
    assert torch.equal(body, blank)
    found = decoded(body, layout, num_kept, encoding).float()
    wanted = torch.from_numpy(twin(rows, layout, num_kept, encoding, channels)).to(rows.dtype).float()
    torch.testing.assert_close(found, wanted, rtol=2 * UNIT_ROUNDOFF[layout.dtype], atol=1e-6)


def bound(group: np.ndarray, bits: int, dtype: str) -> np.floating:
    """Half a step, what fp16 takes of zero and scale, and what the model's dtype takes of the result."""
    low, high, levels = group.min(), group.max(), 2**bits - 1
    scale = (high - low) / levels
    half = abs(low) * HALF_ROUNDOFF + levels * scale * HALF_ROUNDOFF + (1 + levels) * HALF_TINY
    return scale / 2 + half + (max(abs(low), abs(high)) + half) * UNIT_ROUNDOFF[dtype] * 1.01


@given(
    st.sampled_from([8, 4, 2]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(1, 40),
    st.sampled_from([8, 32, 63]),
    st.floats(-7, 4),
    st.integers(0, 2**32 - 1),
)
def test_no_value_is_off_by_more_than_half_a_step_and_rounding(
    bits: int, dtype: str, kept: int, head_dim: int, magnitude: float, seed: int
) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=head_dim, dtype=dtype)
    encoding = Encoding(bits=bits, group=16, residual=0, key_channels=head_dim)
    torch.manual_seed(seed)
    rows = (torch.randn(2 * kept, head_dim) * 10**magnitude).clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE)
    rows = rows.to(TORCH_DTYPES[dtype])
    found = decoded(encoded(rows, layout, (kept,), encoding, None), layout, (kept,), encoding)
    plain, error = rows.double().numpy(), (found.double() - rows.double()).abs().numpy()
    for first in range(0, kept, 16):
        for channel in range(head_dim):
            group = slice(first, min(first + 16, kept)), channel
            assert error[group].max() <= bound(plain[group], bits, dtype)
    for row in range(kept, 2 * kept):
        for first in range(0, head_dim, 16):
            assert error[row, first : first + 16].max() <= bound(plain[row, first : first + 16], bits, dtype)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.375, MAX_MAGNITUDE, -MAX_MAGNITUDE])
def test_equal_values_stay_what_they_are(value: float, dtype: str) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype=dtype)
    encoding = Encoding(bits=2, group=8, residual=0, key_channels=8)
    rows = torch.full((20, 8), value, dtype=TORCH_DTYPES[dtype])
    assert torch.equal(decoded(encoded(rows, layout, (10,), encoding, None), layout, (10,), encoding), rows)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_the_largest_values_stay_finite(dtype: str) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype=dtype)
    rows = torch.tensor([MAX_MAGNITUDE, -MAX_MAGNITUDE] * 8, dtype=TORCH_DTYPES[dtype])[:, None].repeat(1, 8)
    for bits in (8, 4, 2):
        encoding = Encoding(bits=bits, group=8, residual=0, key_channels=8)
        found = decoded(encoded(rows, layout, (8,), encoding, None), layout, (8,), encoding)
        torch.testing.assert_close(found, rows, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 32769.0, -40000.0])
def test_what_fp16_could_not_hold_does_not_fit(value: float) -> None:
    rows = torch.zeros(5, 8)
    assert fits(rows)
    rows[3, 2] = value
    assert not fits(rows)


@given(st.sampled_from([8, 4, 2, 1]), st.integers(0, 5), st.integers(1, 40), st.integers(0, 99))
def test_packed_codes_come_back_and_lie_where_the_format_says(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    packed = pack_codes(torch.from_numpy(codes), bits)
    width = packed.shape[1]
    assert width == -(-columns * bits // 8)
    for row, column in np.ndindex(rows, columns):
        byte = int(packed[row, column % width])
        assert byte >> column // width * bits & 2**bits - 1 == codes[row, column]
    np.testing.assert_array_equal(unpack_codes(packed, columns, bits), codes)


@pytest.mark.parametrize("flipped", [0, 1])
def test_another_number_of_channels_than_announced_is_refused(flipped: int) -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
    encoding = Encoding(bits=8, group=8, residual=0, key_channels=4)
    rows = some_rows(layout, (9, 9))
    body = encoded(rows, layout, (9, 9), encoding, some_channels(layout, encoding))
    at = next(iter(encoding.layers(layout, (9, 9)))).fields["channels"].offset
    body[at + flipped] ^= 1
    with pytest.raises(InvalidRequestError) as caught:
        decoded(body, layout, (9, 9), encoding)
    assert caught.value.reason == "PARCEL_ENCODING"


@given(st.binary(min_size=1, max_size=64), st.data())
def test_any_bytes_of_the_right_size_are_decoded_or_refused(noise: bytes, data: st.DataObject) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="bfloat16")
    encoding = data.draw(encodings(layout))
    size = encoding.body_bytes(layout, (9, 1, 3, 40))
    body = torch.tensor(list(noise), dtype=torch.uint8).repeat(size // len(noise) + 1)[:size].clone()
    with contextlib.suppress(InvalidRequestError):
        assert decoded(body, layout, (9, 1, 3, 40), encoding).shape == (2 * 53, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4, 2, 0])
def test_a_gpu_writes_the_same_bytes(bits: int) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=63, dtype="bfloat16")
    encoding = Encoding(bits=bits, group=32, residual=5, key_channels=40)
    rows, channels = some_rows(layout, (100, 33, 5, 70)), some_channels(layout, encoding)
    assert channels is not None
    wanted = encoded(rows, layout, (100, 33, 5, 70), encoding, channels)
    body = torch.full_like(wanted, 0xA5, device="cuda")
    encode(rows.cuda(), layout, (100, 33, 5, 70), encoding, channels.cuda(), body)
    assert torch.equal(body.cpu(), wanted)
    assert fits(rows.cuda())
