"""What a stack does when more is asked of it than it can do: how much it still answers, how it refuses the rest, and
whether memory stays where it is.

Starts a stack with little KV memory and a short queue, measures what it can take with clients that wait for their
answers, then sends exactly that, then more, as a Poisson process that does not care what becomes of its requests.

    python -m benchmarks.overload --minutes 10 --rate 1.2 --json -
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from benchmarks.overload.config import OverloadConfig
from benchmarks.overload.measure import Run
from benchmarks.report import table, write_json
from deploy.local.stack import Modules, Stack, run_stack

# 128 + SIGINT, as shells count
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, *, modules: Modules | None = None) -> int:
    """Measures, prints a table, writes JSON; returns the exit code."""
    try:
        config = tyro.cli(OverloadConfig, args=argv, description=__doc__)
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
    found: dict[str, Any] = {}

    async def job(stack: Stack) -> int:
        pids = {service.name: stack.child(service.name).pid for service in stack.services}
        run = Run(config, stack.address, stack.services[0].metrics_address, pids)
        found.update(await run.measure())
        return 0

    code = asyncio.run(run_stack(config.stack, job, interrupted=EXIT_INTERRUPTED, modules=modules))
    if found:
        _show(config, found)
    return code


def _show(config: OverloadConfig, found: dict[str, Any]) -> None:
    sys.stdout.write(f"{_table(found['results'])}\n\n{_sentence(found)}\n")
    workload = {key: value for key, value in dataclasses.asdict(config).items() if key != "json"}
    workload["model"] = os.path.relpath(config.model)
    write_json(config.json, {"benchmark": "overload", "workload": workload, **found})


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["load", "offered req/s", "completed", "req/s", "goodput req/s", "refused", "TTFT ms", "most waiting"]
    lines = [
        [
            row["load"],
            f"{row['offered_requests_per_s']:.2f}" if "offered_requests_per_s" in row else "-",
            str(row["completed"]),
            f"{row['request_throughput']:.2f}",
            f"{row['request_goodput']:.2f}",
            ", ".join(f"{count} {what}" for what, count in row["refused"].items()) or "0",
            "-" if row["median_ttft_ms"] is None else f"{row['median_ttft_ms']:.0f} / {row['p99_ttft_ms']:.0f}",
            str(row["most_waiting"]),
        ]
        for row in rows
    ]
    return f"TTFT: median / p99\n\n{table(header, lines)}"


def _sentence(found: dict[str, Any]) -> str:
    goodput = "-" if found["goodput_ratio"] is None else f"{found['goodput_ratio']:.2f}"
    grown = ", ".join(f"{name} {mib:+.1f}" for name, mib in found["results"][-1]["rss_growth_mib"].items()) or "-"
    refusals = "all" if found["only_exhausted"] else "NOT all"
    return (
        f"goodput under overload over that at capacity: {goodput}; {refusals} refusals are RESOURCE_EXHAUSTED; "
        f"memory, last quarter over second quarter of the overload, MiB: {grown}"
    )


if __name__ == "__main__":
    sys.exit(main())
