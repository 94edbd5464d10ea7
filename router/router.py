"""A running router: its parts, the order in which they start, and the order in which they stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from random import Random
from typing import Any

import grpc

from router.accounting import Accounting
from router.admission.admission import Admission
from router.admission.api_tokens import ApiTokens
from router.admission.callers import Callers, TokenInterceptor
from router.admission.tenants import Tenants
from router.admission.waiting import Rooms
from router.background import Background
from router.config import RouterConfig
from router.health import follow_workers
from router.http_extra import http_server
from router.placement.catalogue import POLICIES
from router.requests.finished import FinishedAnswers
from router.requests.generations import Generations
from router.requests.means import Limits, Means
from router.requests.migration import Migration
from router.requests.parcels import Parcels
from router.requests.reception import Reception
from router.service import SERVICE_NAME, InferenceServicer
from router.shadow import Shadow
from router.workers.client import WorkerClient
from router.workers.silence import break_silence
from router.workers.table import WorkerTable
from shared.registry.location import open_registry
from shared.rpc.options import MAX_REQUEST_BYTES, PUBLIC_OPTIONS
from shared.rpc.server import RpcServer
from shared.telemetry.exporter import MetricsExporter, watch_event_loop
from shared.telemetry.metrics import RouterMetrics
from shared.telemetry.tracer import open_tracer

# After the drain time is over, what is left is cancelled and gets this long to clean up behind itself.
SETTLE_S = 5.0


class Router:
    """Construct it inside the event loop, `start` it, and `stop` it once."""

    def __init__(self, config: RouterConfig) -> None:
        """Builds the parts; nothing runs yet.

        Raises:
            ValueError: The registry's location, or a file of certificates or tokens, cannot be read.
        """
        self._config = config
        self._identity = config.identity()
        self._callers = Callers(ApiTokens(config.api_tokens) if config.api_tokens else None)
        self.metrics = RouterMetrics(worker=config.name)
        self._tracer = open_tracer(
            config.otlp_endpoint, role=self.metrics.role, name=config.name, share=config.trace_share
        )
        self.accounting = Accounting(self.metrics)
        self._background = Background()
        self._registry = open_registry(config.registry)
        self.table = WorkerTable(
            self._registry,
            connect=self._connect,
            background=self._background,
            poll_interval_s=config.poll_interval_s,
            slow_start_s=config.slow_start_s,
        )
        self._rooms = Rooms(config.room_limits)
        parcels = Parcels(self._background)
        limits = Limits(
            prefill_timeout_s=config.prefill_timeout_s,
            transfer_timeout_s=config.transfer_timeout_s,
            token_timeout_s=config.token_timeout_s,
            patience_s=config.control_timeout_s,
            max_failovers=config.max_failovers,
        )
        self.shadow = Shadow(
            config.shadow_share,
            table=self.table,
            rooms=self._rooms,
            accounting=self.accounting,
            parcels=parcels,
            limits=limits,
        )
        admission = Admission(
            self.table,
            POLICIES[config.placement](Random()),  # noqa: S311 -- no secret depends on it
            background=self._background,
            accounting=self.accounting,
            rooms=self._rooms,
            queue_timeout_s=config.queue_timeout_s,
            comeback_s=config.comeback_s,
            make_room=self.shadow.give_way,
        )
        self.generations = Generations(
            self.table,
            Means(admission=admission, parcels=parcels, background=self._background, limits=limits),
            tenants=Tenants(config.tenant_limits),
            accounting=self.accounting,
            min_retention=config.min_retention,
            tracer=self._tracer,
        )
        self._migration = Migration(self.table, self.generations.running, self._background)
        self._parcels = parcels
        self._finished = FinishedAnswers()
        self._reception = Reception(self.generations, self._finished, self.shadow, self.accounting, self._callers)
        self._running = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Listens and begins to look for workers.

        Raises:
            OSError: A port cannot be bound.
        """
        config = self._config
        servicer = InferenceServicer(self._reception, self.table, self.accounting)
        async with contextlib.AsyncExitStack() as stack:
            exporter = MetricsExporter(self.metrics.registry, host=config.host, port=config.metrics_port)
            stack.enter_context(exporter)
            self._server = await RpcServer.start(
                name=config.name,
                host=config.host,
                port=config.port,
                register=servicer.register,
                services=[SERVICE_NAME],
                max_request_bytes=MAX_REQUEST_BYTES,
                credentials=self._credentials(),
                options=PUBLIC_OPTIONS,
                guards=[TokenInterceptor(self._callers, self.accounting)] if self._callers.known else [],
            )
            stack.push_async_callback(self._tracer.close)
            stack.push_async_callback(self._registry.close)
            stack.push_async_callback(self.table.close)
            stack.push_async_callback(self._background.settle, SETTLE_S)
            stack.push_async_callback(self._server.stop, 0)
            self.http_address = await self._serve_http(stack)
            await stack.enter_async_context(_running(self.table.run()))
            await stack.enter_async_context(_running(break_silence(self.table, config.token_timeout_s)))
            await stack.enter_async_context(_running(self._migration.run()))
            await stack.enter_async_context(watch_event_loop(self.metrics.event_loop_delay))
            self._health = asyncio.create_task(follow_workers(self.table, self.accounting, self._server.set_ready))
            self.address, self.metrics_address = self._server.address, exporter.address
            self._running = stack.pop_all()

    async def stop(self) -> bool:
        """Drains, then stops everything; False when requests had to be cancelled.

        Until the running requests have ended the server stays reachable, so that new ones hear why they are refused.
        """
        self._health.cancel()
        await asyncio.gather(self._health, return_exceptions=True)
        await self._server.set_ready(False)
        await self.shadow.close()
        finished = await self.generations.drain(self._config.drain_s)
        await self._running.aclose()
        return finished

    async def settle(self, timeout_s: float) -> None:
        """Waits for a shadow request, and for releases and clean-ups of requests that have ended."""
        await self.shadow.settle(timeout_s)
        await self._background.settle(timeout_s)

    def check_integrity(self) -> None:
        """Asserts that idle means idle."""
        idle = not self.generations.busy and not self.shadow.busy
        self.generations.check_integrity()
        self._rooms.check_integrity(idle=not self.generations.busy)
        self.table.check_integrity(idle=idle)
        # releases are on their way a moment longer than requests
        self._parcels.check_integrity(idle=idle and not len(self._background))
        self._finished.check_integrity()

    def _connect(self, address: str) -> WorkerClient:
        config = self._config
        return WorkerClient(
            address,
            poll_timeout_s=config.poll_timeout_s,
            control_timeout_s=config.control_timeout_s,
            identity=self._identity,
        )

    async def _serve_http(self, stack: contextlib.AsyncExitStack) -> str:
        """Where HTTP is served; empty where it is not."""
        config = self._config
        if config.http_port is None:
            return ""
        server = await http_server().HttpServer.start(
            self._reception,
            self.table,
            host=config.host,
            port=config.http_port,
            timeout_s=config.http_timeout_s,
            image_url_hosts=config.image_url_hosts,
            ui=config.ui,
            is_ready=lambda: bool(self.table.served_models()) and not self.generations.draining,
            identity=self._identity,
            demand_client_cert=config.demand_client_cert,
        )
        stack.push_async_callback(server.stop)
        address: str = server.address
        return address

    def _credentials(self) -> grpc.ServerCredentials | None:
        if self._identity is None:
            return None
        return self._identity.server_credentials(demand_client_cert=self._config.demand_client_cert)


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs `work` in a task of its own while open."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
