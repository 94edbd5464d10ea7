"""The parcel arena: one sealed, pre-faulted memfd of a prefill worker that decode workers map read-only.

Written in place by the selection gather. It has no name, so nothing can be left behind: the kernel frees it with
the last descriptor or mapping, after SIGKILL too. The seals forbid shrinking (a reader would die of SIGBUS),
growing, and new writable mappings; the owner's own mapping stays writable. Sources: memfd_create(2), fcntl(2).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass

from shared.errors import FailedPreconditionError
from shared.kv.extents import Extent, ExtentAllocator

# Linux 5.1; CPython names it only from 3.13 on.
F_SEAL_FUTURE_WRITE = 0x0010
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Slot:
    """An extent of the arena in use; `generation` is never given out twice."""

    extent: Extent
    generation: int


class Arena:
    """The owner's side. One thread allocates and frees; writing into a slot may happen in any.

    Args:
        capacity: Bytes.

    Raises:
        OSError: The kernel cannot promise that much shared memory.
    """

    def __init__(self, capacity: int) -> None:
        self._extents = ExtentAllocator(capacity)
        self._slots: dict[int, Slot] = {}
        self._generation = 0
        self.fd = os.memfd_create("vlcache-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.capacity)
            # a clean ENOSPC now instead of SIGBUS later, and no page fault on the hot path
            os.posix_fallocate(self.fd, 0, self.capacity)
            self._map = mmap.mmap(self.fd, self.capacity, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def capacity(self) -> int:
        """Bytes of the arena."""
        return self._extents.capacity

    @property
    def memory(self) -> memoryview:
        """All of it, for whoever must prepare it as a whole."""
        return memoryview(self._map)

    @property
    def used_bytes(self) -> int:
        """Bytes in slots."""
        return self._extents.used_bytes

    def allocate(self, nbytes: int) -> Slot | None:
        """A slot of at least `nbytes`, or None when no piece fits now."""
        extent = self._extents.allocate(nbytes)
        if extent is None:
            return None
        self._generation += 1
        slot = Slot(extent, self._generation)
        self._slots[slot.generation] = slot
        return slot

    def free(self, slot: Slot) -> None:
        """Gives a slot back; views of it must be gone or unused."""
        del self._slots[slot.generation]
        self._extents.free(slot.extent)

    def shrink(self, slot: Slot, nbytes: int) -> Slot:
        """Gives back what a slot has beyond `nbytes`; the returned slot replaces it."""
        assert slot.generation in self._slots, "the slot was freed"
        smaller = Slot(self._extents.shrink(slot.extent, nbytes), slot.generation)
        self._slots[slot.generation] = smaller
        return smaller

    def view(self, slot: Slot, nbytes: int) -> memoryview:
        """The first `nbytes` of a slot, writable."""
        assert slot.generation in self._slots, "the slot was freed"
        assert nbytes <= slot.extent.nbytes
        return memoryview(self._map)[slot.extent.offset : slot.extent.offset + nbytes]

    def check_integrity(self) -> None:
        """Asserts that slots and extents agree."""
        self._extents.check_integrity()
        assert sum(slot.extent.nbytes for slot in self._slots.values()) == self._extents.used_bytes

    def close(self) -> None:
        """Closes the descriptor; the mapping goes with its last view."""
        os.close(self.fd)


class ArenaView:
    """A reader's side: the whole arena mapped read-only.

    Takes ownership of `fd`.

    Raises:
        FailedPreconditionError: The descriptor is not a sealed arena of the announced size.
    """

    def __init__(self, fd: int, capacity: int) -> None:
        try:
            _require_sealed(fd, capacity)
            self._map = mmap.mmap(fd, capacity, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        self.capacity = capacity

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes [offset, offset + nbytes), read-only.

        Raises:
            FailedPreconditionError: They do not lie inside the arena.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.capacity:
            raise FailedPreconditionError("the slot lies outside the arena", reason="ARENA_BOUNDS")
        return memoryview(self._map)[offset : offset + nbytes]


def _require_sealed(fd: int, capacity: int) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise FailedPreconditionError("the descriptor is no memfd", reason="ARENA_SEALS") from error
    # without SHRINK the owner could kill us with SIGBUS
    if not seals & fcntl.F_SEAL_SHRINK:
        raise FailedPreconditionError("the arena is not sealed", reason="ARENA_SEALS")
    if os.fstat(fd).st_size != capacity or capacity < 1:
        raise FailedPreconditionError("the arena is not as large as announced", reason="ARENA_SIZE")
