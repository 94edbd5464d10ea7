"""What a router adds to a token on its way from the decode worker to the client, and how many tokens one core carries.

Workers that compute nothing (`benchmarks.router_hop_workers`, a process of their own) stamp every token when its step
begins. The same number of streams reads them through a router and without one, several times in turn.

    python -m benchmarks.router_hop --streams 1 64 256 --json -
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
import uvloop
import vlcache
from tqdm import tqdm

from benchmarks.report import table, write_json
from deploy.local.forks import Forks
from deploy.local.processes import Child

START_TIMEOUT_S = 60.0
STOP_S = 10.0
# The hand-over at the beginning is not what is asked about.
SKIPPED_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class HopConfig:
    """How many streams, how long, how fast."""

    streams: tuple[int, ...] = (1, 64, 256)
    """Streams at the same time, one measurement after another."""
    tokens: int = 100
    """Tokens of a stream."""
    rounds: int = 3
    """Measurements of either way, in turn."""
    step_ms: float = 50.0
    """Milliseconds between two tokens of a stream."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        if not self.streams or min(self.streams) < 1:
            raise ValueError(f"streams must be at least 1, not {self.streams}")
        if self.tokens <= SKIPPED_TOKENS:
            raise ValueError(f"tokens must be more than the {SKIPPED_TOKENS} that are skipped, not {self.tokens}")
        if self.rounds < 1 or self.step_ms <= 0:
            raise ValueError("rounds and step_ms must be greater than 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON; returns the exit code."""
    try:
        config = tyro.cli(HopConfig, args=argv, description=__doc__)
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
    rows = uvloop.run(_measure(config))
    header = [
        "streams",
        "direct ms p50 / p99",
        "routed ms p50 / p99",
        "added ms p50 / p99",
        "tokens/s per core direct / routed",
    ]
    sys.stdout.write(table(header, [_shown(row) for row in rows]) + "\n")
    workload = {key: value for key, value in dataclasses.asdict(config).items() if key != "json"}
    write_json(config.json, {"benchmark": "router_hop", "workload": workload, "results": rows})
    return 0


async def _measure(config: HopConfig) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name, Forks([]) as forks:
        folder = Path(name)
        flags = ["--step-ms", str(config.step_ms)]
        workers = await Child.start(forks, "benchmarks.router_hop_workers", "workers", flags, log_dir=folder, roles=3)
        try:
            heard = {said.role: said.address for said in await workers.announcements(START_TIMEOUT_S)}
            flags = ["--registry", f"static://{heard['prefill']},{heard['decode']}"]
            router = await Child.start(forks, "router", "router", flags, log_dir=folder)
            try:
                (said,) = await router.announcements(START_TIMEOUT_S)
                return await _compare(config, heard["direct"], said.address, pids=(workers.pid, router.pid))
            finally:
                await router.stop(STOP_S)
        finally:
            await workers.stop(STOP_S)


async def _compare(config: HopConfig, direct: str, routed: str, *, pids: tuple[int, int]) -> list[dict[str, Any]]:
    async with vlcache.AsyncClient(direct) as straight, vlcache.AsyncClient(routed) as through:
        await through.wait_ready(START_TIMEOUT_S)
        return [await _row(config, count, straight, through, pids) for count in config.streams]


async def _row(
    config: HopConfig, count: int, straight: vlcache.AsyncClient, through: vlcache.AsyncClient, pids: tuple[int, int]
) -> dict[str, Any]:
    taken_ms: tuple[list[float], list[float]] = ([], [])
    spent_s = [0.0, 0.0]
    for _ in tqdm(range(config.rounds), unit="round", file=sys.stderr, desc=f"{count} streams"):
        for way, (client, pid) in enumerate(zip((straight, through), pids, strict=True)):
            before_s = _cpu_s(pid)
            taken_ms[way].extend(await _ask(client, count, config.tokens))
            spent_s[way] += _cpu_s(pid) - before_s
    direct_ms, routed_ms = taken_ms
    direct_s, routed_s = spent_s
    tokens = count * config.tokens * config.rounds
    (direct_p50, direct_p99), (routed_p50, routed_p99) = _quantiles(direct_ms), _quantiles(routed_ms)
    return {
        "streams": count,
        "direct_ms_p50": direct_p50,
        "direct_ms_p99": direct_p99,
        "routed_ms_p50": routed_p50,
        "routed_ms_p99": routed_p99,
        "added_ms_p50": routed_p50 - direct_p50,
        "added_ms_p99": routed_p99 - direct_p99,
        "tokens_per_s_per_core": tokens / routed_s,
        # of a server that does nothing but write them
        "direct_tokens_per_s_per_core": tokens / direct_s,
    }


async def _ask(client: vlcache.AsyncClient, count: int, tokens: int) -> list[float]:
    """Milliseconds that tokens were on their way."""
    sampling = vlcache.Sampling(max_new_tokens=tokens)
    taken_ms: list[float] = []

    async def read() -> None:
        seen: list[float] = []
        async with client.stream("Go on", sampling=sampling) as stream:
            async for event in stream:
                if isinstance(event, vlcache.Delta):
                    now_ns = time.monotonic_ns()
                    seen += [(now_ns - int(sent_ns)) / 1e6 for sent_ns in event.text.split()]
        assert len(seen) == tokens
        taken_ms.extend(seen[SKIPPED_TOKENS:])

    await asyncio.gather(*(read() for _ in range(count)))
    return taken_ms


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    median, tail = np.quantile(values, (0.5, 0.99)).tolist()
    return median, tail


def _cpu_s(pid: int) -> float:
    """Seconds that the threads of a process have computed."""
    spent_ns = (int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(spent_ns) / 1e9


def _shown(row: dict[str, Any]) -> list[str]:
    pairs = [f"{row[f'{way}_ms_p50']:.2f} / {row[f'{way}_ms_p99']:.2f}" for way in ("direct", "routed", "added")]
    per_core = [f"{row[f'{way}tokens_per_s_per_core']:.0f}" for way in ("direct_", "")]
    return [str(row["streams"]), *pairs, " / ".join(per_core)]


if __name__ == "__main__":
    sys.exit(main())
