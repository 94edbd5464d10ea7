"""Images that nobody has seen before, written without Pillow."""

import random
import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB_8_BIT = (8, 2, 0, 0, 0)  # depth, colour type, and the only compression, filter and interlace there are
_BLOCK = 16


def random_png(width: int, height: int, dice: random.Random) -> bytes:
    """Blocks of random colours, 16 pixels wide: every image is another one, and small."""
    blocks = -(-width // _BLOCK)
    rows = bytearray()
    for top in range(0, height, _BLOCK):
        colours = dice.randbytes(3 * blocks)
        pixels = b"".join(colours[at : at + 3] * _BLOCK for at in range(0, len(colours), 3))
        rows += (b"\0" + pixels[: 3 * width]) * min(_BLOCK, height - top)
    header = struct.pack(">IIBBBBB", width, height, *_RGB_8_BIT)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(rows))) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
