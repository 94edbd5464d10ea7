"""A load generator with the metrics and keys of `vllm bench serve`: what compression does for a stack under load.

Starts a stack with little KV memory, or asks one that runs; puts the same loads on it at every retention in turns.

    python -m benchmarks.serve --json -
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro
import vlcache

from benchmarks.report import write_json
from benchmarks.serve.config import ServeBenchConfig
from benchmarks.serve.measure import measure
from benchmarks.serve.report import ratios, tables
from deploy.local.stack import Modules, run_stack

# 128 + SIGINT, as shells count
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, *, modules: Modules | None = None) -> int:
    """Measures, prints tables, writes JSON; returns the exit code."""
    try:
        config = tyro.cli(ServeBenchConfig, args=argv, description=__doc__)
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
    found: dict[str, Any] = {}
    try:
        code = asyncio.run(_measure(config, found, modules))
    except vlcache.VlcacheError as error:
        raise SystemExit(f"the service does not answer: {error}") from error
    if found:
        _show(config, found)
    return code


async def _measure(config: ServeBenchConfig, found: dict[str, Any], modules: Modules | None) -> int:
    """Fills `found`; returns the exit code."""

    async def job(address: str) -> int:
        found.update(await measure(config, address))
        return 0

    if config.address:
        return await job(config.address)
    return await run_stack(
        config.stack, lambda stack: job(stack.address), interrupted=EXIT_INTERRUPTED, modules=modules
    )


def _show(config: ServeBenchConfig, found: dict[str, Any]) -> None:
    rows = found["results"]
    compared = ratios(rows)
    sys.stdout.write(f"{tables(rows)}\n\n{_sentence(compared)}\n")
    write_json(config.json, {"benchmark": "serve", "workload": _workload(config), **compared, **found})


def _sentence(compared: dict[str, Any]) -> str:
    goodput, throughput = (
        "-" if compared[key] is None else f"{compared[key]:.2f}" for key in ("goodput_ratio", "throughput_ratio")
    )
    return f"smallest over largest retention, each at its best load: goodput {goodput}, throughput {throughput}"


def _workload(config: ServeBenchConfig) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "json"}
    return {**settings, "model": os.path.relpath(config.model)}


if __name__ == "__main__":
    sys.exit(main())
