"""`python -m decode_worker`: parse, build, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib

from decode_worker.config import DecodeConfig
from decode_worker.kv_receiver import SERVICE_NAME as TRANSFER_SERVICE_NAME
from decode_worker.service import SERVICE_NAME
from decode_worker.worker import DecodeWorker, build_engine, load_model
from shared.config import parse_config
from shared.rpc.lifecycle import stop_signal
from shared.rpc.server import RpcServer
from shared.telemetry.announce import announce
from shared.telemetry.exporter import MetricsExporter, watch_event_loop
from shared.telemetry.logs import configure_logging


async def serve(config: DecodeConfig) -> None:
    """Runs the worker until SIGTERM or SIGINT, then drains."""
    model = load_model(config)
    worker = DecodeWorker(config, model, *build_engine(config, model))
    server = await RpcServer.start(
        name=config.name,
        host=config.listen.host,
        port=config.listen.port,
        register=worker.register,
        services=[SERVICE_NAME, TRANSFER_SERVICE_NAME],
    )
    async with contextlib.AsyncExitStack() as stack:
        metrics = stack.enter_context(
            MetricsExporter(worker.metrics.registry, host=config.listen.host, port=config.listen.metrics_port)
        )
        await stack.enter_async_context(watch_event_loop(worker.metrics.event_loop_delay))
        await server.set_ready(True)
        stopped = stop_signal()
        announce(name=config.name, role="decode", address=server.address, metrics_address=metrics.address)
        await stopped
        await server.set_ready(False)
        await worker.drain(config.drain_s)
        await server.stop()
        await worker.close()


if __name__ == "__main__":
    settings = parse_config(DecodeConfig, "A vlcache decode worker.")
    configure_logging(settings.name)
    asyncio.run(serve(settings))
