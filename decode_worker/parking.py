"""Sequences that wait outside the pool: room for new tokens was promised sparingly, and these outgrew their promise.

First come, first served. Who parked first by arrival gets memory first; when there is none, the youngest running
sequences are moved out for it, and no new reservation is accepted meanwhile. The oldest can therefore always go on,
and everyone becomes the oldest. A parked sequence comes back bit by bit, so its tokens are those of one that stayed.

Each answer of a request parks by itself, and takes a copy of the rows along that it reads in common with the others:
they leave the pool with the last answer, and come back with the first.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from decode_worker.answers import Answer, Reservation, Wanted
from decode_worker.kv_pool.base import ExportedKV, KVPool, SequenceKV, growth_of
from decode_worker.kv_pool.parts import divided
from decode_worker.promise import own_rows
from decode_worker.reservations import Reservations
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
        fail: Ends a request whose KV could not be copied, with all its answers: they may read what was not written.
    """

    def __init__(
        self,
        *,
        pool: KVPool[Any, Any],
        reservations: Reservations,
        thread: Executor,
        promised_tokens: int,
        make_room: Callable[[Answer], object],
        rejoin: Callable[[Answer], object],
        fail: Callable[[Reservation], object],
    ) -> None:
        self._pool = pool
        self._reservations = reservations
        self._thread = thread
        self._promised_tokens = promised_tokens
        self._make_room = make_room
        self._rejoin = rejoin
        self._fail = fail
        self._queue: list[Answer] = []
        self._moving_out: set[Answer] = set()
        self._copies: set[asyncio.Task[None]] = set()
        reservations.on_free = self.restore

    @property
    def waiting(self) -> int:
        """Sequences outside the pool."""
        return len(self._queue)

    def park(self, answer: Answer) -> None:
        """Moves a sequence out; the step thread no longer touches it, but `in_use` still stands."""
        self._moving_out.add(answer)
        self._start(answer, self._move_out(answer))

    def restore(self) -> None:
        """Brings back whoever fits, in order; to be called when memory came free, or someone might have to leave."""
        self._queue = [answer for answer in self._queue if not answer.ended]
        while self._queue:
            head = self._queue[0]
            assert head.parked is not None
            assert head.sequence is not None
            if any(leaving.arrival < head.arrival for leaving in self._moving_out):
                return
            room = self._room(head.sequence, head.parked)
            found = head.reservation.shared
            try:
                self._reservations.occupy(head, self._wanted(head, head.parked, room))
            except ResourceExhaustedError:
                if not self._moving_out:  # which brings memory, maybe enough
                    self._make_room(head)
                return
            if head.shared is not None and head.shared is not found:
                shared_rows = head.reservation.shared_rows
                head.shared.kv = self._pool.place(head.shared.allocation, shared_rows, 0)
            parked, head.parked, head.in_use = head.parked, None, True
            self._queue.pop(0)
            self._start(head, self._move_in(head, parked, room, brings_shared=head.shared is not found))

    async def _move_out(self, answer: Answer) -> None:
        assert answer.sequence is not None
        parked = await self._copy(answer, partial(self._pool.export, answer.sequence.kv))
        self._moving_out.remove(answer)
        answer.in_use = False
        if answer.ended:
            self._reservations.release_memory(answer)
            return
        answer.parked = parked
        bisect.insort(self._queue, answer, key=lambda parked: parked.arrival)
        self._reservations.vacate(answer)

    async def _move_in(self, answer: Answer, parked: ExportedKV, room: int, *, brings_shared: bool) -> None:
        assert answer.sequence is not None
        # in order, in one thread: who finds shared rows in place copies after who has brought them
        kv = await self._copy(answer, partial(self._install, answer, parked, room, brings_shared=brings_shared))
        if kv is None or answer.ended:
            self._reservations.release_memory(answer)
            return
        answer.sequence.kv = kv
        self._rejoin(answer)

    def _install(self, answer: Answer, parked: ExportedKV, room: int, *, brings_shared: bool) -> SequenceKV:
        shared_rows, shared = answer.reservation.shared_rows, answer.shared
        if shared is None:
            place = (answer.allocation, parked.num_kept, parked.body, room, parked.eviction, parked.seen)
            return self._pool.install(*place)
        first, rest = divided(self._pool.layout, parked.num_kept, parked.body, shared_rows)
        if brings_shared:
            self._pool.fill(shared.kv, first)
        own = own_rows(parked.num_kept, shared_rows)
        return self._pool.install(answer.allocation, own, rest, room, seen=parked.seen, shared=shared.kv)

    def _wanted(self, answer: Answer, parked: ExportedKV, room: int) -> Wanted:
        shared_rows, growth = answer.reservation.shared_rows, growth_of(room, parked.eviction)
        own = self._pool.sequence_bytes(own_rows(parked.num_kept, shared_rows), growth)
        shared = self._pool.sequence_bytes(shared_rows, 0) if answer.reservation.shares else None
        return Wanted({answer.choice: own}, shared)

    async def _copy(self, answer: Answer, work: Callable[[], Result]) -> Result | None:
        """Runs `work` in the thread; None when it failed, which has ended the request."""
        try:
            return await run_to_end(self._thread, work)
        except Exception:
            log.exception("the KV of a request could not be copied")
            self._fail(answer.reservation)
            return None

    def _room(self, sequence: Sequence, parked: ExportedKV) -> int:
        """At least doubles, so that a long answer moves only a few times, and holds what is known to follow."""
        left = sequence.sampling.max_new_tokens - sequence.generated
        enough = min(left, max(self._promised_tokens, sequence.generated, len(sequence.known) + 1))
        return self._pool.free_room(parked.num_kept, enough, left, parked.eviction)

    def _start(self, answer: Answer, copy: Coroutine[Any, Any, None]) -> None:
        with within(answer.scope):
            task = asyncio.get_running_loop().create_task(copy)
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)
