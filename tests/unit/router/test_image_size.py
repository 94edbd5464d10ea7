"""Sizes from headers, against a decoder's; and bytes of any kind."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from router.image_size import pixels_of

WAYS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpeg": {"format": "JPEG"},
    "progressive": {"format": "JPEG", "progressive": True},
    "with metadata": {"format": "JPEG", "exif": b"Exif\0\0" + bytes(500), "comment": b"hello", "dpi": (72, 72)},
    "webp": {"format": "WEBP"},
    "lossless": {"format": "WEBP", "lossless": True},
}
SIDES = st.integers(1, 300)


def encoded(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("way", WAYS)
@given(width=SIDES, height=SIDES)
def test_the_size_is_the_decoders(way: str, width: int, height: int) -> None:
    assert pixels_of(encoded(width, height, **WAYS[way])) == width * height


def test_an_animation_is_as_large_as_its_frames() -> None:
    frames = [Image.new("RGB", (31, 17), "red")]
    assert pixels_of(encoded(31, 17, format="WEBP", save_all=True, append_images=frames)) == 31 * 17


def test_transparency_changes_the_header_alone() -> None:
    assert pixels_of(encoded(31, 17, "RGBA", format="WEBP")) == 31 * 17
    assert pixels_of(encoded(31, 17, "RGBA", format="WEBP", lossless=True)) == 31 * 17


def test_other_formats_and_odd_headers_have_no_size() -> None:
    jpeg = encoded(20, 20, format="JPEG")
    for data in (b"", b"GIF89a", encoded(9, 9, format="BMP"), jpeg[:2] + b"\xff\xd0" + jpeg[2:], jpeg[:2] + b"\0" * 99):
        assert pixels_of(data) is None


def test_bytes_that_fill_up_a_marker_are_skipped() -> None:
    jpeg = encoded(20, 30, format="JPEG")
    assert pixels_of(jpeg[:2] + b"\xff\xff\xff" + jpeg[2:]) == 600


def test_the_largest_frame_counts() -> None:
    small, large = encoded(8, 8, format="JPEG"), encoded(80, 80, format="JPEG")
    frame = large.index(b"\xff\xc0")
    length = 2 + int.from_bytes(large[frame + 2 : frame + 4], "big")
    for at in (2, small.index(b"\xff\xda")):
        assert pixels_of(small[:at] + large[frame : frame + length] + small[at:]) == 6400


@given(st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF"]), st.binary(max_size=80))
@example(b"RIFF", b"0000WEBPVP8X" + bytes(9))
@example(b"\xff\xd8", b"\xff" * 60)
def test_any_bytes_have_a_size_or_none(begins: bytes, rest: bytes) -> None:
    found = pixels_of(begins + rest)
    assert found is None or found >= 0
