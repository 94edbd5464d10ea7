"""Memory of every process and the length of the router's queue, over time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.meanwhile import meanwhile
from shared.rpc.options import MIB

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Moments that a curve is made of, at most, and seconds between two of them, at least.
MAX_MOMENTS, LEAST_INTERVAL_S = 120, 1.0


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One look at everything."""

    at_s: float
    """Since the watch began."""
    waiting: int
    """Requests in the router's queue."""
    rss_mib: Mapping[str, float]
    """By process, its children included."""


@contextlib.asynccontextmanager
async def watched(pids: Mapping[str, int], metrics_address: str, *, duration_s: float) -> AsyncIterator[list[Moment]]:
    """While open, for about `duration_s`, the list grows."""
    moments: list[Moment] = []
    interval_s = max(LEAST_INTERVAL_S, duration_s / MAX_MOMENTS)
    async with meanwhile(_look_on(pids, f"http://{metrics_address}/metrics", interval_s, moments)):
        yield moments


def rss_mib(pid: int) -> float:
    """Resident memory of a process and of its children, MiB; 0 for one that has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * PAGE_BYTES / MIB + sum(map(rss_mib, map(int, children)))


def growth_mib(moments: Sequence[Moment]) -> dict[str, float]:
    """By process, how much more the last quarter of the time holds than the second one; the first warms up."""
    quarter = len(moments) // 4
    if not quarter:
        return {}
    early, late = moments[quarter : 2 * quarter], moments[-quarter:]
    return {name: _median(late, name) - _median(early, name) for name in moments[0].rss_mib}


def _median(moments: Sequence[Moment], name: str) -> float:
    return statistics.median(moment.rss_mib[name] for moment in moments)


async def _look_on(pids: Mapping[str, int], url: str, interval_s: float, moments: list[Moment]) -> None:
    clock = asyncio.get_running_loop().time
    began_s = clock()
    while True:
        waiting = await asyncio.to_thread(_waiting, url)
        rss = {name: rss_mib(pid) for name, pid in pids.items()}
        moments.append(Moment(at_s=clock() - began_s, waiting=waiting, rss_mib=rss))
        await asyncio.sleep(interval_s)


def _waiting(url: str) -> int:
    with urllib.request.urlopen(url, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    return next(int(family.samples[0].value) for family in families if family.name == "vlcache_num_requests_waiting")
