"""Sequences that wait outside the pool: room for new tokens was promised sparingly, and these outgrew their promise.

First come, first served. Who parked first by arrival gets memory first; when there is none, the youngest running
sequences are moved out for it, and no new reservation is accepted meanwhile. The oldest can therefore always go on,
and everyone becomes the oldest. A parked sequence comes back bit by bit, so its tokens are those of one that stayed.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from decode_worker.kv_pool.base import ExportedKV, KVPool, growth_of
from decode_worker.reservations import Reservation, Reservations
from decode_worker.sequence import Sequence
from shared.errors import ResourceExhaustedError
from shared.telemetry.scope import within
from shared.threads import run_to_end

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Parking:
    """Lives on the event loop; copies run in `thread`.

    Args:
        promised_tokens: Room that a sequence comes back with, at least.
        make_room: Asks a running sequence that came after the given one to leave; called again when memory came free.
        rejoin: Takes a sequence that is back in the pool.
        fail: Ends a request whose KV could not be copied.
    """

    def __init__(
        self,
        *,
        pool: KVPool[Any, Any],
        reservations: Reservations,
        thread: Executor,
        promised_tokens: int,
        make_room: Callable[[Reservation], object],
        rejoin: Callable[[Reservation], object],
        fail: Callable[[Reservation], object],
    ) -> None:
        self._pool = pool
        self._reservations = reservations
        self._thread = thread
        self._promised_tokens = promised_tokens
        self._make_room = make_room
        self._rejoin = rejoin
        self._fail = fail
        self._queue: list[Reservation] = []
        self._moving_out: set[Reservation] = set()
        self._copies: set[asyncio.Task[None]] = set()
        reservations.on_free = self.restore

    @property
    def waiting(self) -> int:
        """Sequences outside the pool."""
        return len(self._queue)

    def park(self, reservation: Reservation) -> None:
        """Moves a sequence out; the step thread no longer touches it, but `in_use` still stands."""
        self._moving_out.add(reservation)
        self._start(reservation, self._move_out(reservation))

    def restore(self) -> None:
        """Brings back whoever fits, in order; to be called when memory came free, or someone might have to leave."""
        self._queue = [reservation for reservation in self._queue if not reservation.ended]
        while self._queue:
            head = self._queue[0]
            assert head.parked is not None
            assert head.sequence is not None
            if any(leaving.arrival < head.arrival for leaving in self._moving_out):
                return
            room = self._room(head.sequence, head.parked)
            growth = growth_of(room, head.parked.eviction)
            try:
                self._reservations.occupy(head, self._pool.sequence_bytes(head.parked.num_kept, growth))
            except ResourceExhaustedError:
                if not self._moving_out:  # which brings memory, maybe enough
                    self._make_room(head)
                return
            parked, head.parked, head.in_use = head.parked, None, True
            self._queue.pop(0)
            self._start(head, self._move_in(head, parked, room))

    async def _move_out(self, reservation: Reservation) -> None:
        assert reservation.sequence is not None
        parked = await self._copy(reservation, partial(self._pool.export, reservation.sequence.kv))
        self._moving_out.remove(reservation)
        reservation.in_use = False
        if reservation.ended:
            self._reservations.release_memory(reservation)
            return
        reservation.parked = parked
        bisect.insort(self._queue, reservation, key=lambda parked: parked.arrival)
        self._reservations.vacate(reservation)

    async def _move_in(self, reservation: Reservation, parked: ExportedKV, room: int) -> None:
        assert reservation.sequence is not None
        place = (reservation.allocation, parked.num_kept, parked.body, room, parked.eviction, parked.seen)
        install = partial(self._pool.install, *place)
        kv = await self._copy(reservation, install)
        if kv is None or reservation.ended:
            self._reservations.release_memory(reservation)
            return
        reservation.sequence.kv = kv
        self._rejoin(reservation)

    async def _copy(self, reservation: Reservation, work: Callable[[], Result]) -> Result | None:
        """Runs `work` in the thread; None when it failed, which has ended the request."""
        try:
            return await run_to_end(self._thread, work)
        except Exception:
            log.exception("the KV of a request could not be copied")
            self._fail(reservation)
            return None

    def _room(self, sequence: Sequence, parked: ExportedKV) -> int:
        """At least doubles, so that a long answer moves only a few times, and holds what is known to follow."""
        left = sequence.sampling.max_new_tokens - sequence.generated
        enough = min(left, max(self._promised_tokens, sequence.generated, len(sequence.known) + 1))
        return self._pool.free_room(parked.num_kept, enough, left, parked.eviction)

    def _start(self, reservation: Reservation, copy: Coroutine[Any, Any, None]) -> None:
        with within(reservation.scope):
            task = asyncio.get_running_loop().create_task(copy)
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)
