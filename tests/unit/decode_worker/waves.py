"""Transfers in waves, message by message, made by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from shared.kv.manifest import Manifest
from shared.kv.transport.frames import encode_chunk, encode_opening, encode_trailer
from shared.kv.waves import LAST_WAVE


def random_waves(manifest: Manifest, *, waves: int = 3, seed: int = 0) -> bytes:
    """Of each row."""
    return bytes(random.Random(seed).choices((*range(waves), LAST_WAVE), k=sum(manifest.num_kept)))


def travelling(manifest: Manifest, body: bytes | bytearray, waves: bytes) -> bytes:
    """What is sent of a plain body, wave after wave, and the waves; made by a sort of (wave, place in the body)."""
    layout = manifest.layout
    numbers = list[int]()
    first_row = 0
    for section in layout.sections(manifest.num_kept):
        numbers += 2 * list(waves[first_row : first_row + sum(section.rows)])
        first_row += sum(section.rows)
    rows = np.frombuffer(bytes(body[: manifest.kv_bytes]), dtype=np.uint8).reshape(-1, layout.row_bytes)
    order = sorted(range(len(numbers)), key=lambda row: (numbers[row], row))
    return rows[order].tobytes() + bytes(body[manifest.kv_bytes :]) + waves


def chunks(data: bytes, size: int = 500) -> list[bytes]:
    """The messages of those bytes."""
    view = memoryview(data)
    return [encode_chunk(at, view[at : at + size]) for at in range(0, len(data), size)]


def wave_frames(
    token: bytes, manifest: Manifest, body: bytes | bytearray, waves: bytes | None = None, chunk: int = 500
) -> list[bytes]:
    """The messages of a transfer: opening, chunks, trailer."""
    data = travelling(manifest, body, random_waves(manifest) if waves is None else waves)
    return [encode_opening(token), *chunks(data, chunk), encode_trailer(manifest.to_proto())]


def with_data(sent: Sequence[bytes], data: bytes) -> list[bytes]:
    """The same opening and trailer around other bytes."""
    return [sent[0], *chunks(data), sent[-1]]
