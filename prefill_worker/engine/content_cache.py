"""What was computed of a content, kept for the next request that brings it again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Anything that knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""


Kept = TypeVar("Kept", bound=Sized)


class ContentCache(Generic[Kept]):
    """Owner of what is kept by `ContentKeys`; the least recently used leaves first. In the model thread.

    Args:
        capacity_bytes: Memory of the model's device that all of it may take together; 0 keeps nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._used_bytes = 0

    @property
    def on(self) -> bool:
        """Whether anything can be kept."""
        return self._capacity_bytes > 0

    @property
    def used_bytes(self) -> int:
        """Bytes of what is kept; may be read from any thread."""
        return self._used_bytes

    def get(self, key: bytes) -> Kept | None:
        """What is kept under a key; never to be written to."""
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    def put(self, key: bytes, made: Kept) -> None:
        """Keeps what was not kept, if there can be room for it; nothing else may refer to its memory to write there."""
        assert key not in self._kept, "what is kept is not made again"
        if made.nbytes > self._capacity_bytes:
            return
        while self._used_bytes + made.nbytes > self._capacity_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._used_bytes -= oldest.nbytes
        self._kept[key] = made
        self._used_bytes += made.nbytes

    def check_integrity(self) -> None:
        """Asserts that the count of bytes is that of what is kept, and within bounds."""
        assert self._used_bytes == sum(kept.nbytes for kept in self._kept.values())
        assert self._used_bytes <= self._capacity_bytes
