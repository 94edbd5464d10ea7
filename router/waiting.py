"""The bounded queue in front of full decode workers."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator

from shared.errors import ResourceExhaustedError

RETRY_AFTER_S = 1.0
FIRST_BACKOFF_S = 0.02
LAST_BACKOFF_S = 0.25


class Rooms(defaultdict[str, "WaitingRoom"]):
    """The waiting rooms of all models; one is there as soon as somebody looks."""

    def __init__(self, max_waiting: int) -> None:
        super().__init__(lambda: WaitingRoom(max_waiting))


class WaitingRoom:
    """First come, first served: only the head asks for memory, when some was freed here or its backoff has passed.

    Answers that have begun and lost their worker stand before requests that have not. The backoff covers memory that
    others free (other routers, expired leases).
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._queue: deque[Place] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def ahead_of(self, *, begun: bool) -> int:
        """How many stand before whoever comes now."""
        return sum(place.begun for place in self._queue) if begun else len(self._queue)

    @contextlib.contextmanager
    def place(self, *, begun: bool = False) -> Iterator[Place]:
        """Stands in line while open.

        Args:
            begun: The answer has begun: it is never refused, and only others like it go first.

        Raises:
            ResourceExhaustedError: The line is full.
        """
        if len(self._queue) >= self._max_waiting and not begun:
            raise ResourceExhaustedError(
                "too many requests wait for decode memory", reason="QUEUE_FULL", retry_after_s=RETRY_AFTER_S
            )
        place = Place(self, begun=begun)
        self._queue.insert(self.ahead_of(begun=begun), place)
        try:
            yield place
        finally:
            self._queue.remove(place)
            self.memory_freed()

    def memory_freed(self) -> None:
        """Lets the head try at once."""
        if self._queue:
            self._queue[0].wake()

    def is_head(self, place: Place) -> bool:
        """Whether it is the turn of `place`."""
        return self._queue[0] is place


class Place:
    """One request's place in the line."""

    def __init__(self, room: WaitingRoom, *, begun: bool) -> None:
        self.begun = begun
        self._room = room
        self._woken = asyncio.get_running_loop().create_future()
        self._backoff_s = FIRST_BACKOFF_S

    def wake(self) -> None:
        """Ends the current or the next wait."""
        if not self._woken.done():
            self._woken.set_result(None)

    async def turn(self, give_up_at_s: float) -> bool:
        """Waits until it is worth to ask again; False when the loop's clock reached `give_up_at_s` first."""
        loop = asyncio.get_running_loop()
        while (left_s := give_up_at_s - loop.time()) > 0:
            head = self._room.is_head(self)
            await asyncio.wait({self._woken}, timeout=min(left_s, self._backoff_s) if head else left_s)
            if self._woken.done():
                self._woken = loop.create_future()
            if self._room.is_head(self) and loop.time() < give_up_at_s:
                self._backoff_s = min(2 * self._backoff_s, LAST_BACKOFF_S)
                return True
        return False
