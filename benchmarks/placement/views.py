"""A router in the simulation: its own placement code over its own, partly old, view of the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import xxhash
from vlcache.worker.v1 import worker_pb2

from benchmarks.placement.servers import DecodeServer, PrefillServer
from benchmarks.placement.trace import Request
from router.placement.base import Demand, Pair, Placement
from router.placement.groups import groups_by_model
from router.workers.slow_start import SlowStart
from router.workers.speed import Speed
from router.workers.worker import DECODE, PREFILL, READY, Worker

MODEL = worker_pb2.ServedModel(
    name="simulated",
    layout=worker_pb2.KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
)


class View:
    """What one router knows; `workers` maps each to what it stands for."""

    def __init__(
        self,
        placement: Placement,
        servers: Sequence[PrefillServer | DecodeServer],
        clock: Callable[[], float],
        slow_start_s: float,
    ) -> None:
        self._placement = placement
        self._clock = clock
        self._slow_start = SlowStart(slow_start_s, clock)
        self._typical = Speed()
        self.servers: dict[Worker, PrefillServer | DecodeServer] = {}
        for server in servers:
            self._sit(server)
        self._groups = groups_by_model(self.servers)[MODEL.name]

    def add(self, server: PrefillServer | DecodeServer) -> Worker:
        """A worker that comes late."""
        worker = self._sit(server)
        self._groups = groups_by_model(self.servers)[MODEL.name]
        return worker

    def poll(self, worker: Worker) -> None:
        """A worker reports its load."""
        worker.observe(report(self.servers[worker]))

    def order(self, request: Request) -> Iterator[Pair]:
        """The router's order of pairs."""
        return self._placement.order(self._groups, demand_of(request))

    def _sit(self, server: PrefillServer | DecodeServer) -> Worker:
        client = client_of(len(self.servers))
        worker = Worker(client, report(server), clock=self._clock, slow_start=self._slow_start, typical=self._typical)
        self.servers[worker] = server
        return worker

    def check_integrity(self) -> None:
        """Asserts that nothing is left when nothing runs."""
        for worker in self.servers:
            worker.check_integrity()
            assert not worker.charges


def demand_of(request: Request) -> Demand:
    """As admission says it; a few bytes stand for an image, hashed as its content would be."""
    content = b"%d" % request.images[0] if request.images else b""
    return Demand(
        prompt_tokens=request.prompt_tokens,
        kv_tokens=request.kv_tokens,
        image_key=lambda: xxhash.xxh3_64_intdigest(content) if request.images else None,
    )


def report(server: PrefillServer | DecodeServer) -> worker_pb2.WorkerInfo:
    """What a worker says about itself now."""
    if isinstance(server, PrefillServer):
        outstanding = server.outstanding_tokens
        return worker_pb2.WorkerInfo(role=PREFILL, state=READY, model=MODEL, outstanding_tokens=outstanding)
    info = worker_pb2.WorkerInfo(role=DECODE, state=READY, model=MODEL)
    info.kv.capacity, info.kv.active = server.pool_tokens * TOKEN_BYTES, server.used_tokens * TOKEN_BYTES
    return info


def client_of(number: int) -> Any:
    """An address without anybody behind it; every worker is on a host of its own."""
    return SimpleNamespace(open_token_stream=None, address=f"host-{number}:50051")


TOKEN_BYTES = Worker(client_of(0), worker_pb2.WorkerInfo(role=PREFILL, state=READY, model=MODEL)).token_bytes
