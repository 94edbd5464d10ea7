"""Retained parcels of the requests in flight: their leases are kept, and they are given up with the request."""

from __future__ import annotations

import asyncio
import logging

from vlcache.worker.v1 import prefill_pb2

from router.background import Background
from router.workers.worker import Worker
from shared.errors import ServiceError

log = logging.getLogger(__name__)

# A lease of 30 s is renewed every 5 s: several renewals may be lost before it ends.
RENEWALS_PER_LEASE = 6
# Requests that end together are released together.
GATHER_S = 0.01
# However short a worker says its leases are.
MIN_PERIOD_S = 0.02


class Parcels:
    """Owner of the secrets of all parcels that may be sent again. One task per prefill worker that holds any.

    Invariant (`check_integrity`): a worker has a task exactly while something is held there or waits for its release.
    """

    def __init__(self, background: Background) -> None:
        self._background = background
        self._shelves: dict[Worker, _Shelf] = {}

    def hold(self, worker: Worker, retained: prefill_pb2.Retained) -> Parcel:
        """Keeps the lease of a parcel at `worker` until it is released."""
        shelf = self._shelves.get(worker)
        if shelf is None:
            shelf = self._shelves[worker] = _Shelf(worker)
            self._background.spawn(self._keep(shelf))
        return shelf.add(retained)

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
    """One retained parcel. It is `gone` when its worker said so; one that cannot be reached may still have it."""

    def __init__(self, shelf: _Shelf, secret: bytes) -> None:
        self._shelf = shelf
        self.secret = secret
        self.gone = False

    @property
    def worker(self) -> Worker:
        """Who holds it."""
        return self._shelf.worker

    def release(self) -> None:
        """Gives it up. Idempotent; does not wait."""
        self._shelf.remove(self)


class _Shelf:
    """The parcels at one worker."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._held: dict[bytes, Parcel] = {}
        self._released: list[bytes] = []
        self._something_released = asyncio.Event()
        self._renew_at_s = float("inf")
        self._period_s = float("inf")

    @property
    def is_empty(self) -> bool:
        return not (self._held or self._released)

    def add(self, retained: prefill_pb2.Retained) -> Parcel:
        parcel = self._held[retained.parcel] = Parcel(self, retained.parcel)
        self._period_s = max(MIN_PERIOD_S, retained.lease_s / RENEWALS_PER_LEASE)
        self._renew_at_s = min(self._renew_at_s, asyncio.get_running_loop().time() + self._period_s)
        return parcel

    def remove(self, parcel: Parcel) -> None:
        if self._held.pop(parcel.secret, None) is not None:
            self._released.append(parcel.secret)
            self._something_released.set()

    async def turn(self) -> None:
        """Waits for what comes first, a release or the next renewal, and does it."""
        left_s = self._renew_at_s - asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._something_released.wait(), min(max(0.0, left_s), self._period_s))
        # asyncio.TimeoutError is not the built-in one before Python 3.11
        except asyncio.TimeoutError:
            await self._renew()
        else:
            await self._release()

    async def _renew(self) -> None:
        self._renew_at_s = asyncio.get_running_loop().time() + self._period_s
        if not self._held:
            return
        try:
            gone = await self.worker.client.renew_parcels(list(self._held))
        except ServiceError as error:
            # a hiccup: the lease outlives several missed renewals, and a resend will tell
            log.warning("%s did not renew its parcels: %s", self.worker.info.name, error.message)
            return
        for secret in gone:
            parcel = self._held.pop(secret, None)
            if parcel is not None:
                parcel.gone = True

    async def _release(self) -> None:
        await asyncio.sleep(GATHER_S)
        self._something_released.clear()
        released = list(self._released)
        try:
            await self.worker.client.release_parcels(released)
        except ServiceError as error:
            log.info("%s did not confirm a release, the leases end it: %s", self.worker.info.name, error.message)
        del self._released[: len(released)]
