"""`python -m decode_worker`: parse, build, serve, drain."""

from __future__ import annotations

import asyncio

from decode_worker.config import DecodeConfig
from decode_worker.worker import DecodeWorker, build_engine, load_model
from shared.command_line import parse_config
from shared.model.checkpoint import refused_in_a_sentence
from shared.rpc.serving import serve
from shared.telemetry.logs import configure_logging


async def main(config: DecodeConfig) -> None:
    """Runs the worker until SIGTERM or SIGINT, then drains."""
    identity = config.identity()
    with refused_in_a_sentence(config.model):
        model = load_model(config)
    worker = DecodeWorker(config, model, *build_engine(config, model))
    await serve([worker], drain_s=config.drain_s, registry=config.registry, identity=identity)


if __name__ == "__main__":
    settings = parse_config(DecodeConfig, "A vlcache decode worker.")
    configure_logging(settings.name, settings.log_level, settings.log_format)
    asyncio.run(main(settings))
