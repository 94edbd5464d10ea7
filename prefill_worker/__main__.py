"""`python -m prefill_worker`: parse, build, serve, drain."""

from __future__ import annotations

import asyncio

from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker, load_model
from shared.command_line import parse_config
from shared.model.checkpoint import refused_in_a_sentence
from shared.rpc.serving import serve
from shared.telemetry.logs import configure_logging


async def main(config: PrefillConfig) -> None:
    """Runs the worker until SIGTERM or SIGINT, then drains."""
    identity = config.identity()
    with refused_in_a_sentence(config.model):
        worker = PrefillWorker(config, load_model(config), identity=identity)
    await serve([worker], drain_s=config.drain_s, registry=config.registry, identity=identity)


if __name__ == "__main__":
    settings = parse_config(PrefillConfig, "A vlcache prefill worker.")
    configure_logging(settings.name, settings.log_level, settings.log_format)
    asyncio.run(main(settings))
