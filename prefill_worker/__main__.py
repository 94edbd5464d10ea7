"""`python -m prefill_worker`: parse, build, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib

from prefill_worker.config import PrefillConfig
from prefill_worker.service import SERVICE_NAME
from prefill_worker.worker import PrefillWorker, load_model
from shared.config import parse_config
from shared.rpc.lifecycle import stop_signal
from shared.rpc.options import MAX_REQUEST_BYTES
from shared.rpc.server import RpcServer
from shared.telemetry.announce import announce
from shared.telemetry.exporter import MetricsExporter, watch_event_loop
from shared.telemetry.logs import configure_logging


async def serve(config: PrefillConfig) -> None:
    """Runs the worker until SIGTERM or SIGINT, then drains."""
    worker = PrefillWorker(config, load_model(config))
    server = await RpcServer.start(
        name=config.name,
        host=config.listen.host,
        port=config.listen.port,
        register=worker.register,
        services=[SERVICE_NAME],
        max_request_bytes=MAX_REQUEST_BYTES,
    )
    async with contextlib.AsyncExitStack() as stack:
        metrics = stack.enter_context(
            MetricsExporter(worker.metrics.registry, host=config.listen.host, port=config.listen.metrics_port)
        )
        await stack.enter_async_context(watch_event_loop(worker.metrics.event_loop_delay))
        await server.set_ready(True)
        stopped = stop_signal()
        announce(name=config.name, role="prefill", address=server.address, metrics_address=metrics.address)
        await stopped
        await server.set_ready(False)
        await worker.drain(config.drain_s)
        await server.stop()
        await worker.close()


if __name__ == "__main__":
    settings = parse_config(PrefillConfig, "A vlcache prefill worker.")
    configure_logging(settings.name)
    asyncio.run(serve(settings))
