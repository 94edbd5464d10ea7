"""The life of a worker process: serve its roles, say where, drain at a signal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Protocol

import grpc
from vlcache.worker.v1 import worker_pb2

from shared.config import Listen
from shared.registry.entry import Entry
from shared.registry.presence import listed
from shared.rpc.access import RoleInterceptor
from shared.rpc.identity import Identity
from shared.rpc.lifecycle import stop_signal
from shared.rpc.server import RpcServer
from shared.telemetry.announce import announce
from shared.telemetry.exporter import MetricsExporter, watch_event_loop
from shared.telemetry.metrics import WorkerMetrics


class Worker(Protocol):
    """One role of a process; `serve` calls it on the event loop on which it was built."""

    @property
    def name(self) -> str:
        """Of this worker in placements, metrics and logs."""

    @property
    def role(self) -> str:
        """What it says it is: prefill or decode."""

    @property
    def listen(self) -> Listen:
        """Where it wants to listen, and where others find it."""

    @property
    def services(self) -> Sequence[str]:
        """Full names of its services, for reflection."""

    @property
    def max_request_bytes(self) -> int:
        """Size of the largest message that it takes."""

    @property
    def metrics(self) -> WorkerMetrics:
        """What its /metrics port shows."""

    def register(self, server: grpc.aio.Server) -> None:
        """Adds its services to a server."""

    def info(self) -> worker_pb2.WorkerInfo:
        """Who it is and how loaded it is now."""

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests, before it awaits anything, and lets the others finish for `timeout_s`."""

    async def close(self) -> None:
        """Gives everything back; it was drained."""


async def serve(
    workers: Sequence[Worker], *, drain_s: float, registry: str = "", identity: Identity | None = None
) -> None:
    """Runs all roles, each on ports of its own, until SIGTERM or SIGINT; then drains them together.

    Args:
        identity: Of the process. With one, callers need a certificate that names their role; without, all is plaintext.
        registry: Location of the registry in which they are listed meanwhile; none when empty.

    Raises:
        OSError: A port cannot be bound.
    """
    servers = [await _start(worker, identity) for worker in workers]
    async with contextlib.AsyncExitStack() as stack:
        exporters = [stack.enter_context(_exporter(worker)) for worker in workers]
        for worker, server in zip(workers, servers, strict=True):
            await stack.enter_async_context(watch_event_loop(worker.metrics.event_loop_delay))
            await server.set_ready(True)
        async with listed(registry, lambda: _entries(workers, servers)) as renew:
            stopped = stop_signal()
            for worker, server, metrics in zip(workers, servers, exporters, strict=True):
                announce(name=worker.name, role=worker.role, address=server.address, metrics_address=metrics.address)
            await stopped
            for server in servers:
                await server.set_ready(False)
            # together: what one role has in flight ends in the other
            drained = asyncio.gather(*(worker.drain(drain_s) for worker in workers))
            # wakes a task that runs after those: what it reads says draining already
            renew()
            await drained
        await asyncio.gather(*(server.stop() for server in servers))
        for worker in workers:
            await worker.close()


async def _start(worker: Worker, identity: Identity | None) -> RpcServer:
    return await RpcServer.start(
        name=worker.name,
        host=worker.listen.host,
        port=worker.listen.port,
        register=worker.register,
        services=worker.services,
        max_request_bytes=worker.max_request_bytes,
        credentials=identity.server_credentials(demand_client_cert=True) if identity else None,
        guards=[RoleInterceptor()] if identity else [],
    )


def _entries(workers: Sequence[Worker], servers: Sequence[RpcServer]) -> list[Entry]:
    return [
        Entry(address=worker.listen.advertised(server.address), info=worker.info())
        for worker, server in zip(workers, servers, strict=True)
    ]


def _exporter(worker: Worker) -> MetricsExporter:
    return MetricsExporter(worker.metrics.registry, host=worker.listen.host, port=worker.listen.metrics_port)
