"""Parcels of the requests in flight: named by us, their leases are kept, and they are given up with their requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets

from router.background import Background
from router.workers.worker import Worker
from shared.errors import ServiceError
from shared.kv.secret import SECRET_BYTES
from shared.telemetry.scope import NOBODY, within

log = logging.getLogger(__name__)

# A lease of 30 s is renewed every 5 s: several renewals may be lost before it ends.
RENEWALS_PER_LEASE = 6
# Requests that end together are released together.
GATHER_S = 0.01
# However short a worker says its leases are.
MIN_PERIOD_S = 0.02


class Parcels:
    """Owner of the secrets of all parcels that workers have, or may have. One task per prefill worker with any.

    The secret is ours, so that a parcel can be given up whatever was heard of it.

    Invariant (`check_integrity`): a worker has a task exactly while something is named there or waits for its release.
    """

    def __init__(self, background: Background) -> None:
        self._background = background
        self._shelves: dict[Worker, _Shelf] = {}

    def name(self, worker: Worker) -> Parcel:
        """A parcel that `worker` is about to make; to be released, whether it makes one or not."""
        shelf = self._shelves.get(worker)
        if shelf is None:
            shelf = self._shelves[worker] = _Shelf(worker)
            with within(NOBODY):
                self._background.spawn(self._keep(shelf))
        return shelf.add()

    def check_integrity(self, *, idle: bool = False) -> None:
        """Asserts the invariant; `idle` says that no request is in flight and no release on its way."""
        assert all(not shelf.is_empty for shelf in self._shelves.values()), "an empty shelf is still kept"
        assert not (idle and self._shelves), "parcels are held for nobody"

    async def _keep(self, shelf: _Shelf) -> None:
        try:
            while not shelf.is_empty:
                await shelf.turn()
        finally:
            del self._shelves[shelf.worker]


class Parcel:
    """One parcel, from its naming on. It is `retained` and later `gone` when its worker has said so; one that cannot be
    reached may still have it.
    """

    def __init__(self, shelf: _Shelf) -> None:
        self._shelf = shelf
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.retained = False
        self.gone = False

    @property
    def worker(self) -> Worker:
        """Who holds it."""
        return self._shelf.worker

    def keep(self, lease_s: float) -> None:
        """Its worker retains it: the lease is renewed from now on."""
        self.retained = True
        self._shelf.keep(lease_s)

    def lose(self) -> None:
        """Its worker has said that it has none, or none any more: there is nothing to release."""
        self.gone = True
        self._shelf.forget(self)

    def release(self) -> None:
        """Gives it up. Idempotent; does not wait."""
        self._shelf.release(self)


class _Shelf:
    """The parcels at one worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._named: dict[bytes, Parcel] = {}
        self._released: list[bytes] = []
        self._news = asyncio.Event()
        self._renew_at_s: float | None = None
        self._period_s = float("inf")

    @property
    def is_empty(self) -> bool:
        return not (self._named or self._released)

    def add(self) -> Parcel:
        parcel = Parcel(self)
        self._named[parcel.secret] = parcel
        return parcel

    def keep(self, lease_s: float) -> None:
        self._period_s = max(MIN_PERIOD_S, lease_s / RENEWALS_PER_LEASE)
        at_s = asyncio.get_running_loop().time() + self._period_s
        if self._renew_at_s is None or at_s < self._renew_at_s:
            self._renew_at_s = at_s
            self._news.set()

    def forget(self, parcel: Parcel) -> bool:
        """Whether it was still named."""
        self._news.set()
        return self._named.pop(parcel.secret, None) is not None

    def release(self, parcel: Parcel) -> None:
        if self.forget(parcel):
            self._released.append(parcel.secret)

    async def turn(self) -> None:
        """Renews when it is time to, however many are released meanwhile; else waits for that time, or for news."""
        left_s = self._left_s()
        if left_s == 0:
            return await self._renew()
        # asyncio.TimeoutError is not the built-in one before Python 3.11
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), left_s)
        self._news.clear()
        if self._released:
            await self._release()
        return None

    def _left_s(self) -> float | None:
        """To the next renewal; None where nothing is retained yet."""
        if self._renew_at_s is None:
            return None
        return max(0.0, self._renew_at_s - asyncio.get_running_loop().time())

    async def _renew(self) -> None:
        retained = [secret for secret, parcel in self._named.items() if parcel.retained]
        self._renew_at_s = asyncio.get_running_loop().time() + self._period_s if retained else None
        if not retained:
            return
        try:
            gone = await self.worker.client.renew_parcels(retained)
        except ServiceError as error:
            # a hiccup: the lease outlives several missed renewals, and a resend will tell
            log.warning("%s did not renew its parcels: %s", self.worker.info.name, error.message)
            return
        for secret in gone:
            parcel = self._named.get(secret)
            if parcel is not None:
                parcel.lose()

    async def _release(self) -> None:
        await asyncio.sleep(GATHER_S)
        released = list(self._released)
        try:
            await self.worker.client.release_parcels(released)
        except ServiceError as error:
            log.info("%s did not confirm a release, the leases end it: %s", self.worker.info.name, error.message)
        del self._released[: len(released)]
