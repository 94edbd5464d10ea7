"""Owner of the parcel arena: whoever wants to write a parcel waits here, in order, for room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared.errors import TooLargeError
from shared.kv.arena import Arena, Slot


class ParcelStore:
    """Slots of the arena, handed out first come, first served. Lives on the event loop."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self.on_full: Callable[[], bool] = lambda: False
        """Called when nothing fits, before anyone waits: frees a slot that can be spared; False where none can."""

    @property
    def used_bytes(self) -> int:
        """Bytes in slots."""
        return self._arena.used_bytes

    async def allocate(self, nbytes: int) -> Slot:
        """Waits for a slot.

        Raises:
            TooLargeError: The parcel is larger than the whole arena.
        """
        if nbytes > self._arena.capacity:
            raise TooLargeError(
                f"the parcel may need {nbytes} bytes, this worker's arena has {self._arena.capacity}; "
                "ask for a smaller retention",
            )
        async with self._turn:
            while (slot := self._allocate(nbytes)) is None:
                self._freed.clear()
                await self._freed.wait()
            return slot

    def allocate_now(self, nbytes: int) -> Slot | None:
        """A slot, or None where that would mean waiting or overtaking someone who waits."""
        return None if self._turn.locked() else self._allocate(nbytes)

    def view(self, slot: Slot, nbytes: int) -> memoryview:
        """The first `nbytes` of a slot, writable from any thread."""
        return self._arena.view(slot, nbytes)

    def shrink(self, slot: Slot, nbytes: int) -> Slot:
        """Gives back what a slot has beyond `nbytes`; the returned slot replaces it."""
        smaller = self._arena.shrink(slot, nbytes)
        self.wake()
        return smaller

    def free(self, slot: Slot) -> None:
        """Gives a slot back and wakes whoever waits."""
        self._arena.free(slot)
        self.wake()

    def wake(self) -> None:
        """Lets whoever waits look again: something is free, or can be spared now."""
        self._freed.set()

    def check_integrity(self) -> None:
        """Asserts the arena's conservation law."""
        self._arena.check_integrity()

    def _allocate(self, nbytes: int) -> Slot | None:
        while (slot := self._arena.allocate(nbytes)) is None and self.on_full():
            pass
        return slot
