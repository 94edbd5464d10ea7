"""Parcels that stay here after their transfer, so that they can be sent again when their decode worker is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from prefill_worker.parcel.store import ParcelStore
from shared.errors import DuplicateRequestError, NotFoundError
from shared.kv.transport.base import Parcel


@dataclass(eq=False, kw_only=True)
class _Held:
    """A parcel and its lease. `senders` read its slot, which must therefore outlive its end."""

    secret: bytes
    parcel: Parcel
    expires_at: float
    senders: int = 0
    ended: bool = False

    @property
    def nbytes(self) -> int:
        return self.parcel.slot.extent.nbytes


class RetainedParcels:
    """Owner of complete parcels and of their slots. Lives on the event loop.

    A parcel's secret is chosen by who asks for it, who may give it up before it is there: the secret is known from the
    beginning of its call (`expect`) until call and parcel have ended (`expect_no_more`), and nobody else can have it.

    A parcel ends when it is released, when its lease is over, or when the store needs its memory: those go first that
    were used the longest time ago, renewals included, and none that is being sent. One that ends while it is sent is
    unknown at once, and its memory follows.

    Conservation law: `used_bytes` are those of the parcels that are known or still being sent, at most `capacity`.
    Secrets of parcels to come are those of running calls.

    Args:
        capacity: Bytes that may be retained; 0 retains nothing.
        lease_s: Life of a parcel after its last use.
    """

    def __init__(self, store: ParcelStore, *, capacity: int, lease_s: float) -> None:
        self._store = store
        self._capacity = capacity
        # the least recently used first
        self._by_secret: dict[bytes, _Held] = {}
        # of running calls: whether a parcel may still come
        self._expected: dict[bytes, bool] = {}
        # ended, but still being sent
        self._lingering: set[_Held] = set()
        # counted, not summed up: the metrics' thread reads it at any time
        self._used = 0
        self.lease_s = lease_s
        store.on_full = self.evict

    @property
    def used_bytes(self) -> int:
        """Bytes in slots of retained parcels."""
        return self._used

    @property
    def lingering_bytes(self) -> int:
        """Bytes in slots of parcels that have ended and are still being sent."""
        # read from the metrics' thread, too: through one copy
        return sum(held.nbytes for held in tuple(self._lingering))

    @property
    def filling_bytes(self) -> int:
        """Bytes in the store's other slots: those of parcels under way."""
        return self._store.used_bytes - self._used

    def request_id(self, secret: bytes) -> str:
        """Whose parcel it is; empty where none is known."""
        held = self._by_secret.get(secret)
        return held.parcel.manifest.transfer.request_id if held else ""

    def expect(self, secret: bytes) -> None:
        """A call begins whose parcel is to be retained under `secret`; an empty one says that it is not.

        Raises:
            DuplicateRequestError: Another call, or its parcel, has the secret.
        """
        if secret in self._expected or secret in self._by_secret:
            raise DuplicateRequestError("the parcel's secret is in use", reason="PARCEL_IN_USE")
        if secret:
            self._expected[secret] = True

    def expect_no_more(self, secret: bytes) -> None:
        """The call is over that `expect` has begun. What it has retained stays."""
        self._expected.pop(secret, None)

    def retain(self, secret: bytes, parcel: Parcel, now: float) -> bool:
        """Takes over a complete parcel and its slot; others go where both are more than may be retained.

        Returns:
            False, and the slot stays the caller's, where it was not expected or was given up before it came, where it
            is too large, or too much is being sent.
        """
        if not self._expected.get(secret) or not self._make_room(parcel.slot.extent.nbytes):
            return False
        self._expected[secret] = False
        held = _Held(secret=secret, parcel=parcel, expires_at=now + self.lease_s)
        self._by_secret[secret] = held
        self._used += held.nbytes
        return True

    @contextlib.contextmanager
    def sending(self, secret: bytes, now: float) -> Iterator[Parcel]:
        """While open, the parcel's bytes stay, whatever ends it. Several may send it at the same time.

        Raises:
            NotFoundError: It never existed or has ended.
        """
        held = self._by_secret.get(secret)
        if held is None:
            raise NotFoundError("the parcel is gone", reason="NO_PARCEL")
        self._use(held, now)
        held.senders += 1
        try:
            yield held.parcel
        finally:
            held.senders -= 1
            if not held.senders:
                self._let_go(held)

    def renew(self, secret: bytes, now: float) -> bool:
        """Extends a lease; False where the parcel is gone."""
        held = self._by_secret.get(secret)
        if held is not None:
            self._use(held, now)
        return held is not None

    def release(self, secret: bytes) -> None:
        """Gives a parcel up, also one that is still to come. Idempotent."""
        if secret in self._expected:
            self._expected[secret] = False
        if secret in self._by_secret:
            self._end(self._by_secret[secret])

    def expire(self, now: float) -> int:
        """Ends what nobody renewed; returns how many that were."""
        expired = [held for held in self._by_secret.values() if held.expires_at < now]
        for held in expired:
            self._end(held)
        return len(expired)

    def evict(self) -> bool:
        """Gives up the parcel that was used the longest time ago and is not being sent; False where there is none."""
        idle = next((held for held in self._by_secret.values() if not held.senders), None)
        if idle is not None:
            self._end(idle)
        return idle is not None

    def clear(self) -> None:
        """Gives all parcels up."""
        for held in list(self._by_secret.values()):
            self._end(held)

    def check_integrity(self, *, idle: bool = False) -> None:
        """Asserts the conservation law; `idle` says that no call runs."""
        assert not (idle and self._expected), "a parcel is expected of nobody"
        assert not any(self._expected.get(secret) for secret in self._by_secret), "a parcel may come twice"
        held = [*self._by_secret.values(), *self._lingering]
        assert self._used == sum(each.nbytes for each in held), "a slot has no owner"
        assert self._used <= self._capacity, "more is retained than may be"
        assert all(each.ended and each.senders for each in self._lingering)
        assert not any(each.ended for each in self._by_secret.values())

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self._capacity:
            return False
        while self._used + nbytes > self._capacity:
            if not self.evict():
                return False
        return True

    def _use(self, held: _Held, now: float) -> None:
        held.expires_at = now + self.lease_s
        self._by_secret[held.secret] = self._by_secret.pop(held.secret)

    def _let_go(self, held: _Held) -> None:
        """Nobody sends it any more."""
        if held.ended:
            self._lingering.remove(held)
            self._free(held)
        else:
            # whoever waits for memory may have this
            self._store.wake()

    def _end(self, held: _Held) -> None:
        held.ended = True
        del self._by_secret[held.secret]
        if held.senders:
            self._lingering.add(held)
        else:
            self._free(held)

    def _free(self, held: _Held) -> None:
        self._used -= held.nbytes
        self._store.free(held.parcel.slot)
