"""What the worker holds for each request, from the promise of memory to the last token, and the leases on it."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from decode_worker.answers import FROM_THE_BEGINNING, Answer, Reservation, Shared, Stage, Wanted, bytes_of
from decode_worker.kv_pool.base import Allocation, KVPool
from decode_worker.sequence import Sequence
from shared.errors import AlreadyCommittedError, DuplicateRequestError, NotFoundError, ResourceExhaustedError
from shared.kv.arena import ArenaView

TOKEN_BYTES = 16


class Reservations:
    """Owner of all reservations and, through them, of every allocation of the pool.

    Conservation law: the allocations of the answers are exactly what the pool has given out.
    """

    def __init__(self, pool: KVPool[Any, Any], *, lease_s: float) -> None:
        self._pool = pool
        self._arrivals = itertools.count()
        self._by_token: dict[bytes, Reservation] = {}
        # ended, but a thread still uses the memory
        self._lingering: set[Answer] = set()
        self.lease_s = lease_s
        self.idle = asyncio.Event()
        """Set while nothing is held."""
        self.idle.set()
        self.on_free: Callable[[], object] = lambda: None
        """Called after memory went back to the pool."""

    def __iter__(self) -> Iterator[Reservation]:
        return iter(list(self._by_token.values()))

    @property
    def answers(self) -> list[Answer]:
        """Those of all reservations that have not ended."""
        # read from the metrics' thread, too: through copies
        return [answer for held in tuple(self._by_token.values()) for answer in tuple(held.answers.values())]

    def reserve(
        self,
        *,
        request_id: str,
        attempt: int,
        prefill_epoch: str,
        wanted: Wanted,
        max_new_tokens: int,
        arena: ArenaView | None,
        now: float,
        delivered_tokens: Mapping[int, int] = FROM_THE_BEGINNING,
    ) -> Reservation:
        """Promises what is `wanted`.

        Args:
            delivered_tokens: By choice, of the same answers as `wanted`.

        Raises:
            ResourceExhaustedError: No room, or someone who was here before waits for some.
            TooLargeError: There never will be room.
            DuplicateRequestError: The same attempt holds a reservation.
        """
        if any((held.request_id, held.attempt) == (request_id, attempt) for held in self._by_token.values()):
            raise DuplicateRequestError(f"request {request_id!r} already holds a reservation")
        self._let_waiting_go_first()
        reservation = Reservation(
            token=secrets.token_bytes(TOKEN_BYTES),
            request_id=request_id,
            attempt=attempt,
            prefill_epoch=prefill_epoch,
            arrival=next(self._arrivals),
            max_new_tokens=max_new_tokens,
            shares=wanted.shared is not None,
            arena=arena,
            expires_at=now + self.lease_s,
        )
        own, shared = self._allocate(wanted)
        for choice, allocation in own.items():
            reservation.answers[choice] = Answer(
                reservation=reservation,
                choice=choice,
                delivered_tokens=delivered_tokens[choice],
                allocation=allocation,
                shared=shared,
            )
        self._by_token[reservation.token] = reservation
        self.idle.clear()
        return reservation

    def grow(self, reservation: Reservation, wanted: Wanted) -> None:
        """Promises what is `wanted` in all for a parcel that has not begun to arrive; less than it has changes nothing.

        Raises:
            AlreadyCommittedError: A delivery is under way or done.
            ResourceExhaustedError: No room, or someone waits for some; what it has stays.
            TooLargeError: There never will be room.
        """
        if reservation.stage is not Stage.RESERVED:
            raise AlreadyCommittedError("the parcel was delivered already")
        held: list[tuple[Answer | Shared, int]] = [
            (answer, wanted.own[choice]) for choice, answer in reservation.answers.items()
        ]
        if reservation.shared is not None and wanted.shared is not None:
            held.append((reservation.shared, wanted.shared))
        larger = [(holder, nbytes) for holder, nbytes in held if nbytes > holder.pool_bytes]
        if not larger:
            return
        self._let_waiting_go_first()
        before = [(holder, holder.pool_bytes) for holder, _ in larger]
        try:
            for holder, nbytes in larger:
                self._replace(holder, nbytes)
        except ResourceExhaustedError:
            for holder, nbytes in before:
                holder.allocation = self._pool.shrink(holder.allocation, nbytes)
            raise

    def find(self, token: bytes) -> Reservation:
        """The live reservation with that secret.

        Raises:
            NotFoundError: It never existed or has ended.
        """
        reservation = self._by_token.get(token)
        if reservation is None:
            raise NotFoundError("the reservation has ended", reason="NO_RESERVATION")
        return reservation

    def begin_fill(self, reservation: Reservation, stop: Callable[[], object] = lambda: None) -> None:
        """Someone starts to deliver the parcel.

        Args:
            stop: Called if the reservation ends meanwhile: a sender that stalls must not keep the memory.

        Raises:
            AlreadyCommittedError: Another delivery is under way or done.
        """
        if reservation.stage is not Stage.RESERVED:
            raise AlreadyCommittedError("the parcel was delivered already")
        reservation.stage = Stage.FILLING
        reservation.stop_fill = stop

    def end_fill(self, reservation: Reservation) -> None:
        """The delivery failed: the memory waits for another one, or goes where its answer ended meanwhile."""
        reservation.stage = Stage.RESERVED
        self._release_lingering(reservation)

    def activate(self, reservation: Reservation, sequences: Mapping[int, Sequence], installed: Wanted) -> None:
        """The parcel is installed: what the bound had too much is given back, and what those had that ended meanwhile.

        Args:
            sequences: By choice; of all answers that have not ended.
            installed: What is needed, of the same answers and maybe of others.
        """
        reservation.stage = Stage.ACTIVE
        shared = reservation.shared
        if shared is not None:
            assert installed.shared is not None
            shared.allocation = self._pool.shrink(shared.allocation, installed.shared)
        for choice, answer in reservation.answers.items():
            answer.sequence = sequences[choice]
            answer.allocation = self._pool.shrink(answer.allocation, installed.own[choice])
        self._release_lingering(reservation)
        self.on_free()

    def vacate(self, answer: Answer) -> None:
        """Gives the pool its memory back while the answer lives on, parked; no thread uses it any more."""
        self._pool.free(answer.allocation)
        if answer.shared is not None:
            self._pool.free(answer.shared.allocation)
        answer.allocation = answer.shared = None
        self.on_free()

    def occupy(self, answer: Answer, wanted: Wanted) -> None:
        """Takes memory for a parked sequence again, and for rows in common where nobody has them any more.

        Args:
            wanted: Of this answer alone.

        Raises:
            ResourceExhaustedError: No room.
        """
        shared = answer.reservation.shared
        if shared is None or wanted.shared is None:
            own, answer.shared = self._allocate(wanted)
            answer.allocation = own[answer.choice]
            return
        answer.allocation = self._pool.allocate(wanted.own[answer.choice])
        self._pool.hold(shared.allocation)
        answer.shared = shared

    def end(self, answer: Answer) -> None:
        """Forgets an answer. Its memory is free at once unless a thread still uses it. Idempotent."""
        if answer.ended:
            return
        answer.ended = True
        reservation = answer.reservation
        del reservation.answers[answer.choice]
        self._lingering.add(answer)
        if reservation.ended:
            del self._by_token[reservation.token]
        if reservation.stage is Stage.FILLING:
            if reservation.ended:
                reservation.stop_fill()
        elif not answer.in_use:
            self.release_memory(answer)

    def release_memory(self, answer: Answer) -> None:
        """Frees the memory of an ended answer that no thread uses any more."""
        assert answer.ended
        self._lingering.remove(answer)
        if not self._by_token and not self._lingering:
            self.idle.set()
        if answer.allocation is None:
            self.on_free()  # who waits behind it need not wait for it any more
        else:
            self.vacate(answer)

    def renew(self, reservation: Reservation, now: float) -> None:
        """Extends the lease."""
        reservation.expires_at = now + self.lease_s

    def expired(self, now: float) -> list[Answer]:
        """Those whose lease ran out."""
        return [answer for answer in self.answers if answer.leased and answer.reservation.expires_at < now]

    def bytes_in(self, stage: Stage) -> int:
        """Bytes of all reservations in a stage, those of ended answers that linger included."""
        held = (*self.answers, *tuple(self._lingering))
        return bytes_of(answer for answer in held if answer.reservation.stage is stage)

    @property
    def orphan_bytes(self) -> int:
        """Bytes of the pool that no live reservation holds."""
        # from the metrics' thread it may see an allocation a moment before its owner
        return max(0, self._pool.used_bytes - bytes_of(self.answers))

    @property
    def saved_bytes(self) -> int:
        """Bytes that the prompts of the sequences in the pool would need on top."""
        return sum(held.pool_saved_bytes for held in tuple(self._by_token.values()))

    @property
    def parked_bytes(self) -> int:
        """Bytes of KV outside the pool."""
        # read from the metrics' thread, too: each answer once
        return sum(len(kv.body) for kv in [answer.parked for answer in self.answers] if kv)

    def check_integrity(self) -> None:
        """Asserts the conservation law."""
        self._pool.check_integrity()
        assert sum(self.bytes_in(stage) for stage in Stage) == self._pool.used_bytes, "an extent has no owner"
        assert self.idle.is_set() == (not self._by_token and not self._lingering)
        assert all(held.answers for held in self), "a reservation outlived its answers"

    def _let_waiting_go_first(self) -> None:
        if any(answer.parked for answer in self.answers):
            raise ResourceExhaustedError("sequences wait for KV memory", reason="KV_FULL", retry_after_s=0.1)

    def _allocate(self, wanted: Wanted) -> tuple[dict[int, Allocation], Shared | None]:
        """All of it or nothing; each answer holds what they share."""
        taken: list[Allocation] = []
        try:
            sizes = [*wanted.own.values(), *([] if wanted.shared is None else [wanted.shared])]
            for nbytes in sizes:
                taken.append(self._pool.allocate(nbytes))
        except ResourceExhaustedError:
            for allocation in taken:
                self._pool.free(allocation)
            raise
        own = dict(zip(wanted.own, taken, strict=False))
        if wanted.shared is None:
            return own, None
        for _ in range(len(own) - 1):
            self._pool.hold(taken[-1])
        return own, Shared(allocation=taken[-1])

    def _replace(self, holder: Answer | Shared, nbytes: int) -> None:
        """Nothing lies there yet: what it holds may become part of the larger piece."""
        held, holders = holder.pool_bytes, self._pool.holders(holder.allocation)
        for _ in range(holders):
            self._pool.free(holder.allocation)
        try:
            holder.allocation = self._pool.allocate(nbytes)
        except ResourceExhaustedError:
            holder.allocation = self._pool.allocate(held)
            raise
        finally:
            for _ in range(holders - 1):
                self._pool.hold(holder.allocation)

    def _release_lingering(self, reservation: Reservation) -> None:
        for answer in [answer for answer in self._lingering if answer.reservation is reservation]:
            self.release_memory(answer)
