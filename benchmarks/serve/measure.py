"""Puts the loads on a service, retention by retention in turns, and gathers what happened."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import vlcache
from tqdm import tqdm

from benchmarks.serve.config import ServeBenchConfig
from benchmarks.serve.figures import Outcome, figures, parse_objectives
from benchmarks.serve.load import Load
from benchmarks.serve.monitor import Snapshot, monitored, occupancy
from benchmarks.serve.prompts import Prompt, draw_prompts

# Generous: who waits must be counted as slow, not as failed.
DEADLINE_S = 900.0
READY_S = 10.0


@dataclass
class Cell:
    """One load at one retention; grows phase by phase."""

    load: Load
    retention: float
    duration_s: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)

    def row(self, config: ServeBenchConfig, kv_token_bytes: int) -> dict[str, Any]:
        """Its figures."""
        found = figures(self.outcomes, duration_s=self.duration_s, limits_s=parse_objectives(config.goodput))
        grown = found["kv_kept_bytes"] + kv_token_bytes * found["total_output_tokens"]
        return {
            "load": self.load.label,
            "retention": self.retention,
            **found,
            "kv_bytes_per_sequence": grown / found["completed"] if found["completed"] else None,
            **occupancy(self.snapshots),
        }


class Sender:
    """Sends prompts at one retention and calls `tick` after each. A refusal is an outcome, not tried again."""

    def __init__(
        self, client: vlcache.AsyncClient, *, max_new_tokens: int, retention: float, tick: Callable[[], object]
    ) -> None:
        self._client = client
        self._sampling = vlcache.Sampling(max_new_tokens=max_new_tokens, ignore_eos=True)
        self._compression = vlcache.Compression(retention=retention)
        self._tick = tick

    async def send(self, prompt: Prompt) -> Outcome:
        """Waits for the whole answer."""
        try:
            completion = await self._client.generate(
                prompt.question, images=prompt.images, sampling=self._sampling, compression=self._compression
            )
            return Outcome.of(completion)
        except vlcache.VlcacheError as error:
            return Outcome(code=error.code.name)
        finally:
            self._tick()


async def measure(config: ServeBenchConfig, address: str) -> dict[str, Any]:
    """One row per load and retention, and the KV memory of the service in bytes.

    Raises:
        VlcacheError: Nobody answers at `address`.
    """
    drawn = draw_prompts(
        seed=config.seed, count=config.num_prompts + config.warmup, tasks=config.tasks, text_only=config.text_only
    )
    prompts, extra = drawn[: config.num_prompts], drawn[config.num_prompts :]
    timeout, retry = vlcache.Timeout(total_s=DEADLINE_S), vlcache.RetryPolicy(max_attempts=1)
    async with vlcache.AsyncClient(address, timeout=timeout, retry=retry) as client:
        await client.wait_ready(READY_S)
        kv_token_bytes = (await client.models())[0].kv_bytes_per_token
        memory = Snapshot.of(await client.info()).kv_capacity_bytes
        cells = await _run(config, client, prompts, extra)
    return {"kv_memory_bytes": memory, "results": [cell.row(config, kv_token_bytes) for cell in cells]}


async def _run(
    config: ServeBenchConfig, client: vlcache.AsyncClient, prompts: Sequence[Prompt], extra: Sequence[Prompt]
) -> list[Cell]:
    cells = [Cell(load, retention) for load in config.loads for retention in config.retentions]
    total = len(cells) * len(prompts) + len(config.retentions) * len(extra)
    with tqdm(total=total, unit="request", file=sys.stderr) as bar:
        senders = {
            retention: Sender(client, max_new_tokens=config.max_new_tokens, retention=retention, tick=bar.update)
            for retention in config.retentions
        }
        for sender in senders.values():
            await asyncio.gather(*map(sender.send, extra))
        for phase in range(config.phases):
            # back and forth: what drifts on the machine meets all alike
            for cell in cells[:: -1 if phase % 2 else 1]:
                rng = np.random.default_rng([config.seed, phase])
                await _phase(cell, client, senders[cell.retention], prompts[phase :: config.phases], rng)
    return cells


async def _phase(
    cell: Cell, client: vlcache.AsyncClient, sender: Sender, prompts: Sequence[Prompt], rng: np.random.Generator
) -> None:
    clock = asyncio.get_running_loop().time
    async with monitored(client) as snapshots:
        started_s = clock()
        cell.outcomes += await cell.load.run(sender.send, prompts, rng)
        cell.duration_s += clock() - started_s
    cell.snapshots += snapshots
