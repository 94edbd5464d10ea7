"""`python -m router`: parse, start, announce, drain."""

from __future__ import annotations

import asyncio
import logging

import uvloop

from router.config import RouterConfig
from router.router import Router
from shared.command_line import parse_config
from shared.rpc.lifecycle import stop_signal
from shared.telemetry.announce import announce
from shared.telemetry.logs import configure_logging

log = logging.getLogger("router")


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    config = parse_config(RouterConfig, "Balances requests over prefill and decode workers and streams the answers.")
    configure_logging(config.name, config.log_level, config.log_format)
    uvloop.run(_serve(config))


async def _serve(config: RouterConfig) -> None:
    # armed before anyone can know that this process runs
    stopped = asyncio.create_task(stop_signal())
    router = Router(config)
    await router.start()
    announce(
        name=config.name,
        role="router",
        address=router.address,
        metrics_address=router.metrics_address,
        http_address=router.http_address,
    )
    await stopped
    log.info("draining")
    if not await router.stop():
        log.warning("requests were cancelled after %g s", config.drain_s)


if __name__ == "__main__":
    main()
