"""Images and videos in `data:` URIs."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re

from router.http.errors import InvalidFieldError

PREFIX = re.compile(
    r"data:(?P<type>(?P<kind>image|video)/[a-z0-9.+-]+)(?:;[a-z0-9.+-]+=[^;,]*)*;base64,", re.IGNORECASE
)
# vLLM's way to send a video: JPEG files with commas between them.
FRAMES = "video/jpeg"
# Decoded at a time, 3 ms: the tokens of other requests wait no longer. A multiple of four characters.
PIECE = 1 << 20


async def decode(uri: str, kind: str, where: str) -> tuple[str, list[bytes]]:
    """The media type of a `data:` URI of `kind`, image or video, and its file; the files of `FRAMES`.

    Raises:
        InvalidFieldError: It is no such URI.
    """
    prefix = PREFIX.match(uri, 0, 512)
    if prefix is None or prefix["kind"].lower() != kind:
        raise InvalidFieldError(f"not a data:{kind}/...;base64, URI", param=where)
    media_type = prefix["type"].lower()
    encoded = uri[prefix.end() :]
    files = encoded.split(",") if media_type == FRAMES else [encoded]
    return media_type, [await _decoded(file, where) for file in files]


async def _decoded(encoded: str, where: str) -> bytes:
    """In pieces: decoding keeps the interpreter to itself in any thread."""
    pieces = []
    for start in range(0, len(encoded), PIECE):
        piece = encoded[start : start + PIECE]
        try:
            pieces.append(base64.b64decode(piece, validate=True))
        except (binascii.Error, ValueError):
            raise InvalidFieldError("this is no base64", param=where) from None
        if start + PIECE < len(encoded):
            if len(pieces[-1]) * 4 != PIECE * 3:
                raise InvalidFieldError("this base64 goes on behind its end", param=where)
            await asyncio.sleep(0)
    return b"".join(pieces)
