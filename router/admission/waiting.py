"""The bounded queue in front of full decode workers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from router.admission.lanes import Lanes, Rank
from router.admission.vacancies import Vacancies
from shared.errors import ResourceExhaustedError

FIRST_BACKOFF_S = 0.02
LAST_BACKOFF_S = 0.25


@dataclass(frozen=True, kw_only=True)
class RoomLimits:
    """How much may wait for one model."""

    requests: int
    num_bytes: int
    """Of all messages that wait, images included."""


class Rooms(defaultdict[str, "WaitingRoom"]):
    """The waiting rooms of all models; one is there as soon as somebody looks."""

    def __init__(self, limits: RoomLimits) -> None:
        super().__init__(lambda: WaitingRoom(limits))

    def check_integrity(self, *, idle: bool = False) -> None:
        """Asserts the invariants of all; `idle` says that no request is in flight."""
        for room in self.values():
            room.check_integrity(idle=idle)


class WaitingRoom:
    """One at a time: only the head asks for memory, when some was freed here or its backoff has passed.

    Who is the head is a matter of `Lanes`. The backoff covers memory that others free (other routers, expired leases).
    Invariant (`check_integrity`): what is counted is what is there.
    """

    def __init__(self, limits: RoomLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._lanes: Lanes[Place] = Lanes(clock)
        self._vacancies = Vacancies(clock)
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._lanes)

    def would_be_first(self, rank: Rank) -> bool:
        """Whether whoever comes now passes nobody by asking at once."""
        return self._lanes.would_be_first(rank)

    @contextlib.contextmanager
    def place(self, rank: Rank, num_bytes: int) -> Iterator[Place]:
        """Stands in line while open. An answer that has begun is never refused.

        Args:
            num_bytes: Of the request's message.

        Raises:
            ResourceExhaustedError: Too many requests or bytes wait already.
        """
        if not rank.begun:
            self._check_limits(num_bytes)
        if not self._lanes:
            self._vacancies.opened()
        place = Place(self)
        self._lanes.add(rank, place)
        self._num_bytes += num_bytes
        try:
            yield place
        finally:
            self._lanes.remove(rank, place, served=place.served)
            self._num_bytes -= num_bytes
            self._vacancies.vacated()
            self.memory_freed()

    def memory_freed(self) -> None:
        """Lets the head try at once."""
        if (head := self._lanes.first) is not None:
            head.wake()

    def is_head(self, place: Place) -> bool:
        """Whether it is the turn of `place`."""
        return self._lanes.first is place

    def come_back_in_s(self) -> float:
        """When whoever is sent away now may find a place, as far as the last departures tell."""
        return self._vacancies.come_back_in_s()

    def check_integrity(self, *, idle: bool = False) -> None:
        """Asserts the invariant; `idle` says that nobody waits."""
        self._lanes.check_integrity()
        assert self._lanes or not self._num_bytes, "bytes of nobody are counted"
        assert not (idle and self._lanes), "somebody waits for ever"

    def _check_limits(self, num_bytes: int) -> None:
        if len(self._lanes) >= self._limits.requests:
            what = "requests"
        elif self._num_bytes + num_bytes > self._limits.num_bytes:
            what = "bytes of requests"
        else:
            return
        raise ResourceExhaustedError(
            f"too many {what} wait for decode memory",
            reason="QUEUE_FULL",
            retry_after_s=self.come_back_in_s(),
            stage="queue",
        )


class Place:
    """One request's place in the line."""

    def __init__(self, room: WaitingRoom) -> None:
        self.served = False
        """Whether it got what it waited for; who waits sets it, before he leaves."""
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
