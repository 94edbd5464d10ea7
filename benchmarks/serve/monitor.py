"""What the workers are busy with while a load runs: shows what binds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import vlcache

from benchmarks.meanwhile import meanwhile

# The router looks at its workers once a second: more samples would only repeat them.
INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All workers at one moment, as the router last saw them: KV of decode workers in bytes, and sequences."""

    kv_used_bytes: int
    kv_capacity_bytes: int
    decoding: int
    prefilling: int

    @classmethod
    def of(cls, info: vlcache.ServerInfo) -> Snapshot:
        """Sums up what the router says."""
        decode = [worker for worker in info.workers if worker.role == "decode"]
        prefill = [worker for worker in info.workers if worker.role == "prefill"]
        return cls(
            kv_used_bytes=sum(worker.kv.reserved + worker.kv.filling + worker.kv.active for worker in decode),
            kv_capacity_bytes=sum(worker.kv.capacity for worker in decode),
            decoding=sum(worker.requests_running for worker in decode),
            prefilling=sum(worker.requests_running for worker in prefill),
        )


@contextlib.asynccontextmanager
async def monitored(client: vlcache.AsyncClient) -> AsyncIterator[list[Snapshot]]:
    """While open, the list grows."""
    snapshots: list[Snapshot] = []
    async with meanwhile(_look_on(client, snapshots)):
        yield snapshots


def occupancy(snapshots: Sequence[Snapshot]) -> dict[str, float | None]:
    """Means over the snapshots; None without any."""
    keys = ("mean_kv_used_share", "mean_decoding", "mean_prefilling")
    if not snapshots:
        return dict.fromkeys(keys)
    sums = (
        sum(snapshot.kv_used_bytes / snapshot.kv_capacity_bytes for snapshot in snapshots),
        sum(snapshot.decoding for snapshot in snapshots),
        sum(snapshot.prefilling for snapshot in snapshots),
    )
    return {key: total / len(snapshots) for key, total in zip(keys, sums, strict=True)}


async def _look_on(client: vlcache.AsyncClient, snapshots: list[Snapshot]) -> None:
    while True:
        # first the wait: what the router knows at the beginning is about the time before
        await asyncio.sleep(INTERVAL_S)
        snapshots.append(Snapshot.of(await client.info()))
