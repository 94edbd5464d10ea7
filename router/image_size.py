"""How many pixels an encoded image has, from its header: without a decoder, and whatever a stranger sends.

A header that lies gets its request refused by the decode worker, whose reservation is then too small.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
# Marker, and what follows it up to the size of the picture.
JPEG_SEGMENT = struct.Struct(">BBH")
JPEG_FRAME = struct.Struct(">xHH")
# Frames of all codings; the other markers among these numbers are tables.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Tables, comments and what applications add.
OTHERS = frozenset((0xC4, 0xC8, 0xCC, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFE, *range(0xE0, 0xF0)))
SCAN, FILL = 0xDA, 0xFF
# Headers have a few dozen segments.
MAX_SEGMENTS = 4096


def pixels_of(data: bytes) -> int | None:
    """Width times height of a PNG, JPEG or WebP file; None where it is none, or its header is odd."""
    for begins, size in SIZES:
        if data.startswith(begins):
            try:
                return size(data)
            except struct.error:
                return None
    return None


def _png(data: bytes) -> int | None:
    kind, width, height = struct.unpack_from(">4sII", data, 12)
    return width * height if kind == b"IHDR" else None


def _jpeg(data: bytes) -> int | None:
    """The largest frame before the first scan."""
    at, pixels = 2, None
    for _ in range(MAX_SEGMENTS):
        fill, marker, length = JPEG_SEGMENT.unpack_from(data, at)
        if fill != FILL or marker == SCAN:
            return pixels if fill == FILL else None
        if marker in FRAMES:
            height, width = JPEG_FRAME.unpack_from(data, at + JPEG_SEGMENT.size)
            pixels = max(pixels or 0, width * height)
        elif marker not in OTHERS and marker != FILL:
            return None
        # a marker may be filled up with more than one byte
        at += 1 if marker == FILL else 2 + length
    return None


def _webp(data: bytes) -> int | None:
    kind = data[8:16]
    if kind == b"WEBPVP8X":
        return (1 + _little(data, 24, 3)) * (1 + _little(data, 27, 3))
    if kind == b"WEBPVP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return (width & 0x3FFF) * (height & 0x3FFF)
    if kind == b"WEBPVP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (1 + (bits & 0x3FFF)) * (1 + (bits >> 14 & 0x3FFF))
    return None


def _little(data: bytes, at: int, count: int) -> int:
    if len(data) < at + count:
        raise struct.error("the header ends")
    return int.from_bytes(data[at : at + count], "little")


SIZES: tuple[tuple[bytes, Callable[[bytes], int | None]], ...] = ((PNG, _png), (JPEG, _jpeg), (b"RIFF", _webp))
