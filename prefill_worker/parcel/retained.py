"""Parcels that stay here after their transfer, so that they can be sent again when their decode worker is lost."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from prefill_worker.parcel.store import ParcelStore
from shared.errors import NotFoundError
from shared.kv.transport.base import Parcel

SECRET_BYTES = 16


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

    A parcel ends when it is released, when its lease is over, or when the store needs its memory: those go first that
    were used the longest time ago, renewals included, and none that is being sent. One that ends while it is sent is
    unknown at once, and its memory follows.

    Conservation law: `used_bytes` are those of the parcels that are known or still being sent, at most `capacity`.

    Args:
        capacity: Bytes that may be retained; 0 retains nothing.
        lease_s: Life of a parcel after its last use.
    """

    def __init__(self, store: ParcelStore, *, capacity: int, lease_s: float) -> None:
        self._store = store
        self._capacity = capacity
        # the least recently used first
        self._by_secret: dict[bytes, _Held] = {}
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
    def filling_bytes(self) -> int:
        """Bytes in the store's other slots: those of parcels under way."""
        return self._store.used_bytes - self._used

    def retain(self, parcel: Parcel, now: float) -> bytes | None:
        """Takes over a complete parcel and its slot; others go where both are more than may be retained.

        Returns:
            Its secret; None, and the slot stays the caller's, where it is too large, or too much is being sent.
        """
        nbytes = parcel.slot.extent.nbytes
        if nbytes > self._capacity:
            return None
        while self._used + nbytes > self._capacity:
            if not self.evict():
                return None
        held = _Held(secret=secrets.token_bytes(SECRET_BYTES), parcel=parcel, expires_at=now + self.lease_s)
        self._by_secret[held.secret] = held
        self._used += nbytes
        return held.secret

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
        """Gives a parcel up. Idempotent."""
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

    def check_integrity(self) -> None:
        """Asserts the conservation law."""
        held = [*self._by_secret.values(), *self._lingering]
        assert self._used == sum(each.nbytes for each in held), "a slot has no owner"
        assert self._used <= self._capacity, "more is retained than may be"
        assert all(each.ended and each.senders for each in self._lingering)
        assert not any(each.ended for each in self._by_secret.values())

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
