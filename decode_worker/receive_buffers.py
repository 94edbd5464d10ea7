"""Buffers for parcels that arrive over the network, used again and again: fresh memory costs four times the copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

MIN_BYTES = 1 << 16
MAX_IDLE_BYTES = 256 << 20


class ReceiveBuffers:
    """A free list by power of two. Lives on the event loop."""

    def __init__(self) -> None:
        self._idle: dict[int, list[bytearray]] = {}
        self._idle_bytes = 0

    @contextlib.contextmanager
    def borrow(self, nbytes: int) -> Iterator[memoryview]:
        """A buffer of exactly `nbytes` with undefined content."""
        size = max(MIN_BYTES, 1 << (nbytes - 1).bit_length())
        idle = self._idle.setdefault(size, [])
        if idle:
            buffer = idle.pop()
            self._idle_bytes -= size
        else:
            buffer = bytearray(size)
        try:
            yield memoryview(buffer)[:nbytes]
        finally:
            if self._idle_bytes + size <= MAX_IDLE_BYTES:
                idle.append(buffer)
                self._idle_bytes += size
