"""The /metrics port of a process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from types import TracebackType

from prometheus_client import CollectorRegistry, Histogram, start_http_server


class MetricsExporter:
    """Serves a registry over HTTP in a thread of its own; `address` is where (`host:port`)."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        self._host = host
        self._server, self._thread = start_http_server(port, host, registry)
        self.address = f"{host}:{self._server.server_port}"

    def __enter__(self) -> MetricsExporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopping = threading.Thread(target=self._server.shutdown)
        stopping.start()
        # the server looks whether it shall stop twice a second, or after a connection
        with contextlib.suppress(OSError):
            socket.create_connection((self._host, self._server.server_port), timeout=1).close()
        stopping.join()
        self._server.server_close()
        self._thread.join()


@contextlib.asynccontextmanager
async def watch_event_loop(histogram: Histogram, period_s: float = 0.25) -> AsyncIterator[None]:
    """While open, measures how late this event loop wakes up: a blocked loop shows at once."""
    task = asyncio.create_task(_measure(histogram, period_s))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _measure(histogram: Histogram, period_s: float) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + period_s
        await asyncio.sleep(period_s)
        histogram.observe(max(0.0, loop.time() - due))
