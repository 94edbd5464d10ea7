"""`python -m deploy.local serve|demo`: the whole service on this machine."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import tyro

from deploy.local.demo import DemoConfig, load_samples, run_demo
from deploy.local.serve import ServeConfig, run_serve
from deploy.local.stack import Stack, run_stack

COMMANDS: dict[str, Callable[..., Any]] = {"serve": ServeConfig, "demo": DemoConfig}
# 128 + SIGINT, as shells count: a demonstration that was cut short has shown nothing
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        config = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=argv, description=__doc__)
        job, interrupted = _job(config)
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
    return asyncio.run(run_stack(config, job, interrupted=interrupted))


def _job(config: ServeConfig | DemoConfig) -> tuple[Callable[[Stack], Coroutine[Any, Any, int]], int]:
    """What to do with the stack, and the exit code when a signal ends it."""
    if isinstance(config, DemoConfig):
        return functools.partial(run_demo, config=config, samples=load_samples(config.samples)), EXIT_INTERRUPTED
    return functools.partial(run_serve, config=config), 0


if __name__ == "__main__":
    sys.exit(main())
