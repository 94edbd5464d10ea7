"""The table of workers: asked again and again who they are, and shown to placement, health and operators."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vlcache.worker.v1 import worker_pb2

from router.background import Background
from router.placement import Pair
from router.worker import DECODE, PREFILL, READY, UNREACHABLE, Worker
from router.worker_client import WorkerClient
from shared.errors import ServiceError
from shared.registry.registry import Registry

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Seat:
    """One address of the registry and the worker that was last seen there."""

    client: WorkerClient
    worker: Worker | None = None
    look_now: asyncio.Event = field(default_factory=asyncio.Event)
    watcher: asyncio.Task[None] | None = None


class WorkerTable:
    """Owner of every `Worker` and of its channel. `run` polls; everything else reads the result.

    Invariant (`check_integrity`): the load of a worker is the sum of its charges, and both are zero when no request
    is in flight.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        connect: Callable[[str], WorkerClient],
        background: Background,
        poll_interval_s: float,
    ) -> None:
        self._registry = registry
        self._connect = connect
        self._background = background
        self._poll_interval_s = poll_interval_s
        self._seats: dict[str, Seat] = {}
        self._change = asyncio.Event()

    async def run(self) -> None:
        """Polls until cancelled. Every address has its own watcher, so that a silent one delays nobody."""
        try:
            while True:
                self._follow(await self._registry.addresses())
                await asyncio.sleep(self._poll_interval_s)
        finally:
            await self._stop_watchers()

    async def close(self) -> None:
        """Closes every stream and channel; call it after `run` has ended."""
        for seat in self._seats.values():
            if seat.worker is not None:
                await seat.worker.tokens.close()
            await seat.client.close()

    def next_change(self) -> asyncio.Event:
        """Is set at the next change of the table; take it before reading the table to miss none."""
        return self._change

    def workers(self) -> Iterator[Worker]:
        """Every worker that was ever seen and is still in its seat."""
        return (seat.worker for seat in self._seats.values() if seat.worker is not None)

    def unseen(self) -> list[str]:
        """Addresses at which no worker has answered yet."""
        return [address for address, seat in self._seats.items() if seat.worker is None]

    def pairs(self, model: str) -> list[Pair]:
        """Every ready pair that serves `model`; its members can exchange KV."""
        ready = [worker for worker in self.workers() if worker.state == READY and worker.info.model.name == model]
        decode = [worker for worker in ready if worker.info.role == DECODE]
        return [
            Pair(worker, other)
            for worker in ready
            if worker.info.role == PREFILL
            for other in decode
            if other.key == worker.key
        ]

    def known_models(self) -> set[str]:
        """Names of all models of all workers, ready or not."""
        return {worker.info.model.name for worker in self.workers()}

    def served_models(self) -> dict[str, Worker]:
        """Models that at least one ready pair serves, each with a prefill worker that describes it."""
        first = {name: next(iter(self.pairs(name)), None) for name in sorted(self.known_models())}
        return {name: pair.prefill for name, pair in first.items() if pair is not None}

    def suspend(self, worker: Worker) -> None:
        """Leaves `worker` out until it has answered a poll, and asks it at once."""
        worker.state = UNREACHABLE
        for seat in self._seats.values():
            if seat.worker is worker:
                seat.look_now.set()
        self._notify()

    def check_integrity(self, *, idle: bool = False) -> None:
        """Asserts the invariant; `idle` says that no request is in flight."""
        for worker in self.workers():
            worker.check_integrity()
            if idle:
                assert not worker.charges, f"{worker.info.name} still carries load"
                assert not worker.tokens.attached, f"{worker.info.name} still has sequences attached"

    def _follow(self, addresses: Sequence[str]) -> None:
        for address in addresses:
            if address not in self._seats:
                seat = self._seats[address] = Seat(self._connect(address))
                seat.watcher = asyncio.create_task(self._watch(seat))
        for address in set(self._seats) - set(addresses):
            self._let_go(address)

    def _let_go(self, address: str) -> None:
        """Forgets an address that left the registry, but never a worker that still answers or still works."""
        seat = self._seats[address]
        if seat.worker is not None and (seat.worker.state != UNREACHABLE or seat.worker.charges):
            return
        del self._seats[address]
        assert seat.watcher is not None
        seat.watcher.cancel()
        self._background.spawn(seat.client.close())
        self._notify()

    async def _watch(self, seat: Seat) -> None:
        while True:
            seat.look_now.clear()
            await self._look(seat)
            # asyncio.TimeoutError is not the built-in one before Python 3.11
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(seat.look_now.wait(), self._poll_interval_s)

    async def _look(self, seat: Seat) -> None:
        try:
            self._seen(seat, await seat.client.info())
        except ServiceError as error:
            self._not_seen(seat, error)
        self._notify()

    def _seen(self, seat: Seat, info: worker_pb2.WorkerInfo) -> None:
        known = seat.worker
        if known is not None and known.info.epoch == info.epoch:
            return known.observe(info)
        seat.worker = Worker(seat.client, info)
        log.info("%s worker %s at %s is %s", info.role, info.name, seat.client.address, info.state)
        if known is not None:
            # a restarted process remembers nothing: what was attached to the old one is lost
            known.state = UNREACHABLE
            self._background.spawn(known.tokens.close())
        return None

    def _not_seen(self, seat: Seat, error: ServiceError) -> None:
        if seat.worker is not None and seat.worker.state != UNREACHABLE:
            log.warning("worker %s at %s: %s", seat.worker.info.name, seat.client.address, error.message)
        if seat.worker is not None:
            seat.worker.state = UNREACHABLE

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def _stop_watchers(self) -> None:
        watchers = [seat.watcher for seat in self._seats.values() if seat.watcher is not None]
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
