"""One answer of a request, the reservation that it belongs to, and what they hold of the pool."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from decode_worker.eviction.ledger import RowLedger
from decode_worker.kv_pool.base import Allocation, ExportedKV, SequenceKV
from decode_worker.sequence import Sequence
from decode_worker.token_outbox import Subscription
from shared.kv.arena import ArenaView
from shared.model.text_stream import TextStream
from shared.telemetry.scope import NOBODY, Scope

FROM_THE_BEGINNING: Mapping[int, int] = MappingProxyType({0: 0})
"""Delivered tokens of the only answer of a request that has none yet."""


@dataclass(frozen=True)
class Wanted:
    """Bytes of a reservation.

    Attributes:
        own: What each answer has for itself, by choice.
        shared: What they read in common; None where they share nothing.
    """

    own: Mapping[int, int]
    shared: int | None = None

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self.own.values()) + (self.shared or 0)


class Stage(enum.Enum):
    """Where a reservation stands; the value is the `state` label of its bytes."""

    RESERVED = "reserved"
    FILLING = "filling"
    ACTIVE = "active"


@dataclass(eq=False, kw_only=True)
class Shared:
    """Rows that the answers of a reservation read in common; each of those that have memory holds the allocation."""

    allocation: Allocation
    kv: SequenceKV | None = None
    """None before the parcel is installed."""

    @property
    def pool_bytes(self) -> int:
        """Bytes that it is of the pool."""
        return self.allocation.nbytes


@dataclass(eq=False, kw_only=True)
class Answer:
    """One answer of a request, and its memory. Touched on the event loop only.

    `allocation` is None while the sequence is parked outside the pool; `parked` is its KV then. `shared` is None where
    it reads nothing in common with others, and while it is parked. `in_use` says that the step thread or a copy uses
    the memory, which must therefore outlive the end. `arrived` are the tokens that came with the parcel, `delivered`
    those that its reader has, for `delivered_tokens` of which room was promised on top.
    """

    reservation: Reservation
    choice: int
    delivered_tokens: int
    allocation: Allocation | None
    shared: Shared | None = None
    arrived: tuple[int, ...] = ()
    delivered: tuple[int, ...] = ()
    sequence: Sequence | None = None
    text: TextStream | None = None
    subscription: Subscription | None = None
    parked: ExportedKV | None = None
    in_use: bool = False
    ended: bool = False

    @property
    def arrival(self) -> tuple[int, int]:
        """Who came first is served first."""
        return self.reservation.arrival, self.choice

    @property
    def scope(self) -> Scope:
        """That of its request."""
        return self.reservation.scope

    @property
    def pool_bytes(self) -> int:
        """Bytes that it holds of the pool for itself."""
        return self.allocation.nbytes if self.allocation else 0

    @property
    def leased(self) -> bool:
        """Whether it ends when nobody renews it: until it is installed and someone reads its tokens."""
        return self.reservation.stage is not Stage.ACTIVE or self.subscription is None

    @property
    def eviction_at_rest(self) -> RowLedger | None:
        """What the sequence evicts by, if there is anything, while no thread uses it."""
        if self.parked is not None:
            return self.parked.eviction
        return self.sequence.kv.eviction if self.sequence is not None and not self.in_use else None


@dataclass(eq=False, kw_only=True)
class Reservation:
    """What was promised to one request, or several answers of it. Touched on the event loop only.

    `scope` is that of its request, for what is done on its behalf later on.
    `token` is its secret: random, so a late message for an ended reservation finds nothing and revives nothing.
    `answers` are those that have not ended, by choice. `shares` says that they read the prompt's kept rows in common,
    and once a parcel is there how many: `shared_rows`, layer-major, empty before.
    `saved_bytes` are those of the prompt's KV that compression has left out.
    `arrival` counts up.
    """

    token: bytes
    request_id: str
    attempt: int
    prefill_epoch: str
    arrival: int
    max_new_tokens: int
    shares: bool
    arena: ArenaView | None
    expires_at: float
    answers: dict[int, Answer] = field(default_factory=dict)
    shared_rows: tuple[int, ...] = ()
    stage: Stage = Stage.RESERVED
    stop_fill: Callable[[], object] = lambda: None
    saved_bytes: int = 0
    scope: Scope = NOBODY

    @property
    def ended(self) -> bool:
        """Whether all its answers have."""
        return not self.answers

    @property
    def shared(self) -> Shared | None:
        """The rows that some answer reads in common with others at present."""
        return next((answer.shared for answer in self.answers.values() if answer.shared), None)

    @property
    def pool_bytes(self) -> int:
        """Bytes that it holds of the pool."""
        return bytes_of(tuple(self.answers.values()))

    @property
    def pool_saved_bytes(self) -> int:
        """Bytes that what it has in the pool would need on top without compression."""
        present = sum(answer.allocation is not None for answer in tuple(self.answers.values()))
        return self.saved_bytes * (min(1, present) if self.shares else present)


def bytes_of(answers: Iterable[Answer]) -> int:
    """What they hold of the pool; what several of them share counts once."""
    answers = tuple(answers)
    shared = {id(each): each for each in (answer.shared for answer in answers) if each is not None}
    return sum(answer.pool_bytes for answer in answers) + sum(each.pool_bytes for each in shared.values())
