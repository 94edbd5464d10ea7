"""What the worker holds for each request, from the promise of memory to the last token, and the leases on it."""

from __future__ import annotations

import asyncio
import enum
import itertools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from decode_worker.eviction.ledger import RowLedger
from decode_worker.kv_pool.base import Allocation, ExportedKV, KVPool
from decode_worker.sequence import Sequence
from decode_worker.token_outbox import Subscription
from shared.errors import AlreadyCommittedError, DuplicateRequestError, NotFoundError, ResourceExhaustedError
from shared.kv.arena import ArenaView
from shared.model.text_stream import TextStream
from shared.telemetry.scope import NOBODY, Scope

TOKEN_BYTES = 16


class Stage(enum.Enum):
    """Where a reservation stands; the value is the `state` label of its bytes."""

    RESERVED = "reserved"
    FILLING = "filling"
    ACTIVE = "active"


@dataclass(eq=False, kw_only=True)
class Reservation:
    """Memory of one request. Touched on the event loop only.

    `scope` is that of its request, for what is done on its behalf later on.
    `token` is its secret: random, so a late message for an ended reservation finds nothing and revives nothing.
    `saved_bytes` are those of the prompt's KV that compression has left out.
    `arrival` counts up: who came first is served first. `allocation` is None while the sequence is parked outside the
    pool; `parked` is its KV then. `in_use` says that the step thread or a copy uses the memory, which must therefore
    outlive the end. `arrived` are the answer's tokens that came with the parcel, `delivered` those that its reader has,
    for `delivered_tokens` of which room was promised on top.
    """

    token: bytes
    request_id: str
    attempt: int
    prefill_epoch: str
    arrival: int
    allocation: Allocation | None
    max_new_tokens: int
    delivered_tokens: int
    arena: ArenaView | None
    expires_at: float
    arrived: tuple[int, ...] = ()
    delivered: tuple[int, ...] = ()
    stage: Stage = Stage.RESERVED
    sequence: Sequence | None = None
    text: TextStream | None = None
    subscription: Subscription | None = None
    stop_fill: Callable[[], object] = lambda: None
    parked: ExportedKV | None = None
    saved_bytes: int = 0
    scope: Scope = NOBODY
    in_use: bool = False
    ended: bool = False

    @property
    def leased(self) -> bool:
        """Whether it ends when nobody renews it: until it is installed and someone reads its tokens."""
        return self.stage is not Stage.ACTIVE or self.subscription is None

    @property
    def pool_bytes(self) -> int:
        """Bytes that it holds of the pool."""
        return self.allocation.nbytes if self.allocation else 0

    @property
    def eviction_at_rest(self) -> RowLedger | None:
        """What the sequence evicts by, if there is anything, while no thread uses it."""
        if self.parked is not None:
            return self.parked.eviction
        return self.sequence.kv.eviction if self.sequence is not None and not self.in_use else None


class Reservations:
    """Owner of all reservations and, through them, of every allocation of the pool.

    Conservation law: the allocations of the reservations are exactly what the pool has given out.
    """

    def __init__(self, pool: KVPool[Any, Any], *, lease_s: float) -> None:
        self._pool = pool
        self._arrivals = itertools.count()
        self._by_token: dict[bytes, Reservation] = {}
        # ended, but a thread still uses the memory
        self._lingering: set[Reservation] = set()
        self.lease_s = lease_s
        self.idle = asyncio.Event()
        """Set while nothing is held."""
        self.idle.set()
        self.on_free: Callable[[], object] = lambda: None
        """Called after memory went back to the pool."""

    def __iter__(self) -> Iterator[Reservation]:
        return iter(list(self._by_token.values()))

    def reserve(
        self,
        *,
        request_id: str,
        attempt: int,
        prefill_epoch: str,
        nbytes: int,
        max_new_tokens: int,
        arena: ArenaView | None,
        now: float,
        delivered_tokens: int = 0,
    ) -> Reservation:
        """Promises `nbytes`.

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
            allocation=self._pool.allocate(nbytes),
            max_new_tokens=max_new_tokens,
            delivered_tokens=delivered_tokens,
            arena=arena,
            expires_at=now + self.lease_s,
        )
        self._by_token[reservation.token] = reservation
        self.idle.clear()
        return reservation

    def grow(self, reservation: Reservation, nbytes: int) -> None:
        """Promises `nbytes` in all for a parcel that has not begun to arrive; less than it has changes nothing.

        Raises:
            AlreadyCommittedError: A delivery is under way or done.
            ResourceExhaustedError: No room, or someone waits for some; what it has stays.
            TooLargeError: There never will be room.
        """
        if reservation.stage is not Stage.RESERVED:
            raise AlreadyCommittedError("the parcel was delivered already")
        held = reservation.pool_bytes
        if nbytes <= held:
            return
        self._let_waiting_go_first()
        # nothing lies there yet: what it holds may become part of the larger piece
        self._pool.free(reservation.allocation)
        try:
            reservation.allocation = self._pool.allocate(nbytes)
        except ResourceExhaustedError:
            reservation.allocation = self._pool.allocate(held)
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
        """The delivery failed: the memory waits for another one, or goes if the reservation ended meanwhile."""
        reservation.stage = Stage.RESERVED
        if reservation in self._lingering:
            self.release_memory(reservation)

    def activate(self, reservation: Reservation, sequence: Sequence, nbytes: int) -> None:
        """The parcel is installed; what the bound had too much is given back."""
        reservation.stage = Stage.ACTIVE
        reservation.sequence = sequence
        reservation.allocation = self._pool.shrink(reservation.allocation, nbytes)
        self.on_free()

    def vacate(self, reservation: Reservation) -> None:
        """Gives the pool its memory back while the reservation lives on, parked; no thread uses it any more."""
        self._pool.free(reservation.allocation)
        reservation.allocation = None
        self.on_free()

    def occupy(self, reservation: Reservation, nbytes: int) -> None:
        """Takes memory for a parked sequence again.

        Raises:
            ResourceExhaustedError: No room.
        """
        reservation.allocation = self._pool.allocate(nbytes)

    def end(self, reservation: Reservation) -> None:
        """Forgets a reservation. Its memory is free at once unless a thread still uses it. Idempotent."""
        if reservation.ended:
            return
        reservation.ended = True
        del self._by_token[reservation.token]
        self._lingering.add(reservation)
        if reservation.stage is Stage.FILLING:
            reservation.stop_fill()
        elif not reservation.in_use:
            self.release_memory(reservation)

    def release_memory(self, reservation: Reservation) -> None:
        """Frees the memory of an ended reservation that no thread uses any more."""
        assert reservation.ended
        self._lingering.remove(reservation)
        if not self._by_token and not self._lingering:
            self.idle.set()
        if reservation.allocation is None:
            self.on_free()  # who waits behind it need not wait for it any more
        else:
            self.vacate(reservation)

    def renew(self, reservation: Reservation, now: float) -> None:
        """Extends the lease."""
        reservation.expires_at = now + self.lease_s

    def expired(self, now: float) -> list[Reservation]:
        """Those whose lease ran out."""
        return [held for held in self if held.leased and held.expires_at < now]

    def bytes_in(self, stage: Stage) -> int:
        """Bytes of all reservations in a stage, ended ones that linger included."""
        held = (*self._by_token.values(), *self._lingering)
        return sum(reservation.pool_bytes for reservation in held if reservation.stage is stage)

    @property
    def orphan_bytes(self) -> int:
        """Bytes of the pool that no live reservation holds."""
        # from the metrics' thread it may see an allocation a moment before its owner
        live = sum(held.pool_bytes for held in tuple(self._by_token.values()))
        return max(0, self._pool.used_bytes - live)

    @property
    def saved_bytes(self) -> int:
        """Bytes that the prompts of the sequences in the pool would need on top."""
        return sum(held.saved_bytes for held in tuple(self._by_token.values()) if held.allocation is not None)

    @property
    def parked_bytes(self) -> int:
        """Bytes of KV outside the pool."""
        # read from the metrics' thread, too: through one copy, and each reservation once
        parked = [held.parked for held in tuple(self._by_token.values())]
        return sum(len(kv.body) for kv in parked if kv)

    def _let_waiting_go_first(self) -> None:
        if any(held.parked for held in self._by_token.values()):
            raise ResourceExhaustedError("sequences wait for KV memory", reason="KV_FULL", retry_after_s=0.1)

    def check_integrity(self) -> None:
        """Asserts the conservation law."""
        self._pool.check_integrity()
        assert sum(self.bytes_in(stage) for stage in Stage) == self._pool.used_bytes, "an extent has no owner"
        assert self.idle.is_set() == (not self._by_token and not self._lingering)
