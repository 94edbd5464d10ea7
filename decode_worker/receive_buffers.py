"""Buffers for parcels that arrive over the network, used again and again: fresh memory costs four times the copy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

MIN_BYTES = 1 << 16
MAX_IDLE_BYTES = 256 << 20


class ReceiveBuffers:
    """A free list in order of use. Lives on the event loop."""

    def __init__(self) -> None:
        self._idle: list[np.ndarray] = []

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for the next parcels."""
        return sum(map(len, self._idle))

    @contextlib.contextmanager
    def borrow(self, nbytes: int) -> Iterator[memoryview]:
        """A buffer of exactly `nbytes` with undefined content."""
        buffer = self._take(_size_class(nbytes))
        try:
            yield buffer.data[:nbytes]
        finally:
            self._keep(buffer)

    def _take(self, size: int) -> np.ndarray:
        """The smallest idle buffer that fits and is not twice as large as needed; else a new one."""
        fitting = [buffer for buffer in self._idle if size <= len(buffer) <= 2 * size]
        if not fitting:
            # numpy asks the kernel for huge pages
            return np.empty(size, dtype=np.uint8)
        best = min(fitting, key=len)
        self._idle = [buffer for buffer in self._idle if buffer is not best]
        return best

    def _keep(self, buffer: np.ndarray) -> None:
        """In place of those that nobody needed for longest, so that a size which comes often stays."""
        if len(buffer) > MAX_IDLE_BYTES:
            return
        while self.idle_bytes + len(buffer) > MAX_IDLE_BYTES:
            self._idle.pop(0)
        self._idle.append(buffer)


def _size_class(nbytes: int) -> int:
    """`nbytes` rounded up by at most an eighth, so that parcels of about one size share buffers."""
    step = max(MIN_BYTES, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step
