"""The table of workers: asked again and again who they are, and shown to placement, health and operators."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
from vlcache.worker.v1 import worker_pb2

from router.background import Background
from router.placement.base import Group
from router.placement.groups import groups_by_model
from router.workers.client import WorkerClient
from router.workers.slow_start import SlowStart
from router.workers.speed import Speed
from router.workers.worker import DECODE, READY, UNREACHABLE, Worker
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
    trouble: str = ""
    """Why no worker has been seen yet, as last logged."""


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
        slow_start_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._connect = connect
        self._background = background
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._slow_start = SlowStart(slow_start_s, clock)
        self._typical = Speed()
        self._seats: dict[str, Seat] = {}
        self._groups: Mapping[str, Sequence[Group]] | None = None
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

    @property
    def anyone_leaves(self) -> bool:
        """Whether some worker's sequences should go on elsewhere."""
        return any(worker.leaves for worker in self.workers())

    def unseen(self) -> list[str]:
        """Addresses at which no worker has answered yet."""
        return [address for address, seat in self._seats.items() if seat.worker is None]

    def groups(self, model: str) -> Sequence[Group]:
        """Workers that serve `model`, by who can exchange KV; listed anew only when somebody has come or gone."""
        return self._all_groups().get(model, ())

    def partners(self, prefill: Worker) -> Sequence[Worker]:
        """Decode workers that take what `prefill` sends, whether it is ready itself or not."""
        return [
            worker
            for worker in self.workers()
            if worker.info.role == DECODE and worker.state == READY and worker.key == prefill.key
        ]

    def known_models(self) -> set[str]:
        """Names of all models of all workers, ready or not."""
        return {worker.info.model.name for worker in self.workers()}

    def served_models(self) -> dict[str, Worker]:
        """Models that at least one ready pair serves, each with a prefill worker that describes it.

        While workers are replaced by others with another `--max-model-len`, it is one of the longest: what is reserved
        by its description is enough for all.
        """
        ready = {name: [each for each in groups if each.ready] for name, groups in sorted(self._all_groups().items())}
        described = {name: [group.prefill[0] for group in groups] for name, groups in ready.items() if groups}
        return {name: max(workers, key=_context_tokens) for name, workers in described.items()}

    def check_integrity(self, *, idle: bool = False) -> None:
        """Asserts the invariant; `idle` says that no request is in flight."""
        for worker in self.workers():
            worker.check_integrity()
            if idle:
                assert not worker.charges, f"{worker.info.name} still carries load"
                assert not worker.tokens.attached, f"{worker.info.name} still has sequences attached"

    def _all_groups(self) -> Mapping[str, Sequence[Group]]:
        if self._groups is None:
            self._groups = groups_by_model(self.workers())
        return self._groups

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
        self._groups = None
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
            return self._seen_again(known, info)
        self._groups = None
        seat.worker = Worker(
            seat.client,
            info,
            clock=self._clock,
            slow_start=self._slow_start,
            typical=self._typical,
            on_lost=functools.partial(self._lost, seat),
            has_stand_in=self._has_stand_in,
        )
        log.info("%s worker %s at %s is %s", info.role, info.name, seat.client.address, info.state)
        if known is not None:
            # a restarted process remembers nothing: what was attached to the old one is lost
            known.state = UNREACHABLE
            self._background.spawn(known.tokens.close())
        return None

    def _seen_again(self, worker: Worker, info: worker_pb2.WorkerInfo) -> None:
        before = worker.state
        worker.observe(info)
        if worker.state != before:
            self._groups = None

    def _not_seen(self, seat: Seat, error: ServiceError) -> None:
        if seat.worker is None and error.message != seat.trouble:
            seat.trouble = error.message
            log.warning("no worker at %s yet: %s", seat.client.address, _why(error))
        if seat.worker is not None and seat.worker.state != UNREACHABLE:
            log.warning("worker %s at %s: %s", seat.worker.info.name, seat.client.address, error.message)
            seat.worker.state = UNREACHABLE
            self._groups = None

    def _lost(self, seat: Seat) -> None:
        """A call has failed as calls to nobody fail: whether somebody is there is asked at once."""
        seat.look_now.set()
        self._groups = None
        self._notify()

    def _has_stand_in(self, worker: Worker) -> bool:
        what = (worker.info.role, *worker.key)
        others = (other for other in self.workers() if other is not worker)
        return any(
            other.state == READY and other.circuits.admits and (other.info.role, *other.key) == what for other in others
        )

    def _notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def _stop_watchers(self) -> None:
        watchers = [seat.watcher for seat in self._seats.values() if seat.watcher is not None]
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


def _context_tokens(worker: Worker) -> int:
    return worker.info.model.context_tokens


def _why(error: ServiceError) -> str:
    """What happened, and what gRPC says of it, which names addresses and files: an operator's business alone."""
    cause = error.__cause__
    return f"{error.message} ({cause.details()})" if isinstance(cause, grpc.aio.AioRpcError) else error.message
