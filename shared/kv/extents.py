"""Contiguous byte ranges of one fixed buffer: the allocator behind the parcel arena and the KV pool."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass

# Cache line: keeps rows of two owners apart and vector loads aligned.
ALIGNMENT = 64


@dataclass(frozen=True)
class Extent:
    """Bytes [offset, offset + nbytes) of the buffer, owned by whoever allocated them."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.nbytes


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class ExtentAllocator:
    """Best-fit allocation with coalescing; not thread-safe, one owner calls it.

    Conservation law: free + allocated = capacity, and no two extents overlap.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < ALIGNMENT:
            raise ValueError(f"capacity must be at least {ALIGNMENT} bytes, not {capacity}")
        self.capacity = capacity - capacity % ALIGNMENT
        self._free: list[Extent] = [Extent(0, self.capacity)]
        self._allocated: dict[int, Extent] = {}
        # counted, not summed up: the metrics' thread reads it at any time
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Allocated bytes, alignment included."""
        return self._used

    @property
    def free_bytes(self) -> int:
        """Bytes in no extent, in however many pieces."""
        return self.capacity - self.used_bytes

    @property
    def largest_free(self) -> int:
        """Bytes of the largest piece that one allocation can have."""
        return max((extent.nbytes for extent in self._free), default=0)

    def allocate(self, nbytes: int) -> Extent | None:
        """The smallest free piece that fits, cut to size; None when none fits."""
        if nbytes < 1:
            raise ValueError(f"an extent has at least one byte, not {nbytes}")
        wanted = aligned(nbytes)
        fitting = [extent for extent in self._free if extent.nbytes >= wanted]
        if not fitting:
            return None
        piece = min(fitting, key=lambda extent: (extent.nbytes, extent.offset))
        self._free.remove(piece)
        if piece.nbytes > wanted:
            self._insert(Extent(piece.offset + wanted, piece.nbytes - wanted))
        extent = Extent(piece.offset, wanted)
        self._allocated[extent.offset] = extent
        self._used += wanted
        return extent

    def shrink(self, extent: Extent, nbytes: int) -> Extent:
        """Gives back the tail beyond `nbytes`; the old extent is void, the returned one replaces it."""
        self._take(extent)
        kept = Extent(extent.offset, aligned(max(nbytes, 1)))
        assert kept.nbytes <= extent.nbytes, "shrink cannot grow"
        self._allocated[kept.offset] = kept
        self._used += kept.nbytes
        if kept.nbytes < extent.nbytes:
            self._release(Extent(kept.end, extent.nbytes - kept.nbytes))
        return kept

    def free(self, extent: Extent) -> None:
        """Gives an extent back. Freeing it twice is a bug."""
        self._take(extent)
        self._release(extent)

    def has(self, extent: Extent) -> bool:
        """Whether it is allocated, as it is."""
        return self._allocated.get(extent.offset) == extent

    def check_integrity(self) -> None:
        """Asserts the conservation law."""
        pieces = sorted([*self._free, *self._allocated.values()], key=lambda extent: extent.offset)
        position = 0
        for piece in pieces:
            assert piece.offset == position, f"gap or overlap at byte {position}"
            assert piece.nbytes > 0
            position = piece.end
        assert position == self.capacity, "bytes were lost"
        assert self._used == sum(extent.nbytes for extent in self._allocated.values())
        for left, right in itertools.pairwise(self._free):
            assert left.end < right.offset, "free neighbours were not merged"

    def _take(self, extent: Extent) -> None:
        assert self.has(extent), f"{extent} is not allocated"
        del self._allocated[extent.offset]
        self._used -= extent.nbytes

    def _release(self, extent: Extent) -> None:
        index = bisect.bisect_left(self._free, extent.offset, key=lambda free: free.offset)
        start, end = extent.offset, extent.end
        if index < len(self._free) and self._free[index].offset == end:
            end = self._free.pop(index).end
        if index > 0 and self._free[index - 1].end == start:
            index -= 1
            start = self._free.pop(index).offset
        self._free.insert(index, Extent(start, end - start))

    def _insert(self, extent: Extent) -> None:
        bisect.insort(self._free, extent, key=lambda free: free.offset)
