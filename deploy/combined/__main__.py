"""`python -m deploy.combined`: parse, build, serve, drain."""

from __future__ import annotations

import asyncio

from deploy.combined.config import CombinedConfig
from deploy.combined.worker import build_workers, load_model
from shared.command_line import parse_config
from shared.model.checkpoint import refused_in_a_sentence
from shared.rpc.serving import serve
from shared.telemetry.logs import configure_logging


async def main(config: CombinedConfig) -> None:
    """Runs both halves until SIGTERM or SIGINT, then drains."""
    identity = config.identity()
    with refused_in_a_sentence(config.model):
        workers = build_workers(config, load_model(config), identity)
    await serve(workers, drain_s=config.drain_s, registry=config.registry, identity=identity)


if __name__ == "__main__":
    settings = parse_config(CombinedConfig, "A vlcache worker that is both, prefill and decode.")
    configure_logging(settings.name, settings.log_level, settings.log_format)
    asyncio.run(main(settings))
