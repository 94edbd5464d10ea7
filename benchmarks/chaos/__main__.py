"""What clients notice when workers die all the time: answers lost or changed, tokens doubled, pauses, memory left over.

Starts a stack, asks every question undisturbed, then asks again and again while a random worker is killed (SIGKILL) at
every interval and started again. Every stream is compared with its undisturbed twin.

    python -m benchmarks.chaos --requests 1000 --kill-interval 2 --json -
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
import vlcache

from benchmarks.chaos.config import LEASE_S, ChaosConfig
from benchmarks.chaos.figures import compared, failovers, longest_pause_ms, recovery_ms
from benchmarks.chaos.killer import Killer
from benchmarks.chaos.load import DEADLINE_S, ask_all, draw_questions
from benchmarks.report import table, write_json
from deploy.local.stack import Modules, Stack
from shared.telemetry.metrics import BEGUN, NOT_BEGUN

SHARED_MEMORY = Path("/dev/shm")
# Beyond the lease after which what nobody asks for is given up.
IDLE_MARGIN_S = 10.0
LOOK_S = 0.2


def main(argv: Sequence[str] | None = None, *, modules: Modules | None = None) -> int:
    """Measures, prints a table, writes JSON; returns 1 when anything was lost, changed, doubled or left over."""
    try:
        config = tyro.cli(ChaosConfig, args=argv, description=__doc__)
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
    found = asyncio.run(_run(config, modules or Modules()))
    sys.stdout.write(table(["figure", "value"], [[key, _shown(value)] for key, value in found.items()]) + "\n")
    workload = {key: value for key, value in dataclasses.asdict(config).items() if key != "json"}
    workload["model"] = os.path.relpath(config.model)
    write_json(config.json, {"benchmark": "chaos", "workload": workload, **found})
    return int(
        any(found[key] for key in ("lost", "changed_streams", "duplicated_tokens", "orphan_bytes", "leaked_segments"))
    )


async def _run(config: ChaosConfig, modules: Modules) -> dict[str, Any]:
    before = _segments()
    async with Stack(config.stack, modules) as stack:
        await stack.start()
        timeout = vlcache.Timeout(total_s=DEADLINE_S)
        # the first failure counts: nothing may be hidden by asking again
        retry = vlcache.RetryPolicy(max_attempts=1)
        async with vlcache.AsyncClient(stack.address, timeout=timeout, retry=retry) as client:
            found = await _measure(config, stack, client)
            found["orphan_bytes"] = await _orphan_bytes(client)
    return {**found, "leaked_segments": len(_segments() - before)}


async def _measure(config: ChaosConfig, stack: Stack, client: vlcache.AsyncClient) -> dict[str, Any]:
    questions = draw_questions(config)
    twins = await ask_all(client, questions, clients=config.clients, label="undisturbed")
    order = [number % len(questions) for number in range(config.requests)]
    async with Killer(stack, client, interval_s=config.kill_interval, seed=config.seed) as killer:
        asked = [questions[number] for number in order]
        streams = await ask_all(client, asked, clients=config.clients, label="while workers die")
    metrics = await asyncio.to_thread(_read_metrics, stack.services[0].metrics_address)
    return {
        **compared(streams, [twins[number] for number in order]),
        "kills": len(killer.deaths_s),
        "resends": failovers(metrics, "resend"),
        "reprefills": failovers(metrics, "reprefill"),
        # of streams that stood still
        "recovery_ms_p50": recovery_ms(metrics, 0.5, answer=BEGUN),
        "recovery_ms_p99": recovery_ms(metrics, 0.99, answer=BEGUN),
        # of first tokens, whose prompts wait and are computed as ever, once more
        "first_token_ms_p50": recovery_ms(metrics, 0.5, answer=NOT_BEGUN),
        "first_token_ms_p99": recovery_ms(metrics, 0.99, answer=NOT_BEGUN),
        "longest_pause_ms": longest_pause_ms(streams, killer.deaths_s),
    }


async def _orphan_bytes(client: vlcache.AsyncClient) -> int:
    """KV bytes that workers still hold when every lease must have ended."""
    clock = asyncio.get_running_loop().time
    give_up_s = clock() + LEASE_S + IDLE_MARGIN_S
    while True:
        kvs = [worker.kv for worker in (await client.info()).workers]
        held = sum(kv.reserved + kv.filling + kv.active + kv.retained for kv in kvs)
        if not held or clock() > give_up_s:
            return held
        await asyncio.sleep(LOOK_S)


def _read_metrics(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


def _segments() -> set[str]:
    return {entry.name for entry in SHARED_MEMORY.iterdir()}


def _shown(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
