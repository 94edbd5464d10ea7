"""A decode worker's memory with its tenants: admission as the worker does it, without a network and a prefill."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any, NamedTuple

from benchmarks.random_kv import install, ragged
from decode_worker.answers import Reservation, Wanted
from decode_worker.kv_pool.base import KVPool
from decode_worker.reservations import Reservations
from decode_worker.sequence import Sequence
from shared.errors import ResourceExhaustedError
from shared.request.params import Budget


class Occupancy(NamedTuple):
    """How full a pool is.

    Attributes:
        sequences: In the pool.
        used_share: Bytes in allocations over capacity.
        used_over_needed: Bytes in allocations over those of the sequences' KV, tokens to come included.
        fragmentation: Share of the free bytes that one allocation cannot have.
    """

    sequences: int
    used_share: float
    used_over_needed: float
    fragmentation: float


class Tenants:
    """The sequences in one pool.

    Args:
        pool: Empty.
        budget: Of every request.
        body: Random KV of the longest prompt.
        chance: Draws kept counts, lengths, and who ends.
    """

    def __init__(self, pool: KVPool[Any, Any], budget: Budget, *, body: memoryview, chance: Random) -> None:
        self.pool = pool
        self._budget = budget
        self._body = body
        self._chance = chance
        self._reservations = Reservations(pool, lease_s=0.0)
        self._numbers = itertools.count()

    def sequences(self) -> list[Sequence]:
        """All of them, in the order of their arrival."""
        return [answer.sequence for answer in self._reservations.answers if answer.sequence is not None]

    def fill(self, prompt: int, growth: int, *, spread: float = 0.0) -> None:
        """Admits sequences until one is refused.

        Args:
            prompt: Tokens of their prompts.
            growth: New tokens whose room comes with a reservation.
            spread: Prompts differ at random by this share of `prompt` in both directions.
        """
        while self._admit(round(prompt * self._chance.uniform(1 - spread, 1 + spread)), growth):
            pass

    def end_one(self) -> None:
        """A random sequence finishes."""
        self._reservations.end(self._chance.choice(self._reservations.answers))

    def end_all(self) -> None:
        """Everybody finishes."""
        for answer in self._reservations.answers:
            self._reservations.end(answer)

    def occupancy(self) -> Occupancy:
        """Now."""
        pool, sequences = self.pool, self.sequences()
        rows = sum(int((sequence.kv.kept + sequence.kv.room).sum()) for sequence in sequences)
        return Occupancy(
            sequences=len(sequences),
            used_share=pool.used_bytes / pool.capacity,
            used_over_needed=pool.used_bytes / pool.layout.body_bytes([rows]),
            fragmentation=pool.fragmentation,
        )

    def check_integrity(self) -> None:
        """Asserts that every allocation has an owner."""
        self._reservations.check_integrity()

    def _admit(self, prompt: int, growth: int) -> bool:
        """Whether a request for a prompt of that length got in."""
        try:
            reservation = self._reserve(prompt, growth)
        except ResourceExhaustedError:
            return False
        (answer,) = reservation.answers.values()
        assert answer.allocation is not None
        self._reservations.begin_fill(reservation)
        mean = self._budget.share_of(prompt) * prompt
        num_kept = ragged(self.pool.layout, prompt, mean, self._chance)
        sequence = install(self.pool, answer.allocation, num_kept, self._body, position=prompt, growth=growth)
        exact = Wanted({0: self.pool.sequence_bytes(num_kept, growth)})
        self._reservations.activate(reservation, {0: sequence}, exact)
        return True

    def _reserve(self, prompt: int, growth: int) -> Reservation:
        """What the worker promises before the prefill has selected anything."""
        return self._reservations.reserve(
            request_id=str(next(self._numbers)),
            attempt=0,
            prefill_epoch="",
            wanted=Wanted({0: self.pool.bound_bytes(self._budget.kept_tokens_bound(0, prompt), growth)}),
            max_new_tokens=growth + 1,
            arena=None,
            now=0.0,
        )
