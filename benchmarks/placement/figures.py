"""What a simulation comes to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.placement.config import PlacementConfig
from benchmarks.placement.simulation import CLAIRVOYANT, CONTENDERS, Simulation


def figures(contender: str, routers: int, run: Simulation) -> dict[str, Any]:
    """One row; times in seconds."""
    queue = [outcome.queue_s for outcome in run.outcomes.values()]
    first_token = [outcome.first_token_s for outcome in run.outcomes.values()]
    busy = [server.busy_s for server in run.prefill]
    lookups = sum(server.lookups for server in run.prefill)
    return {
        "policy": contender,
        "routers": routers,
        "queue_p50_s": quantile(queue, 0.5),
        "queue_p99_s": quantile(queue, 0.99),
        "ttft_p50_s": quantile(first_token, 0.5),
        "ttft_p99_s": quantile(first_token, 0.99),
        "imbalance": max(busy) / statistics.fmean(busy),
        "hit_rate": sum(server.hits for server in run.prefill) / max(1, lookups),
        "refusals": run.refusals,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as `share` of them."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def cases(config: PlacementConfig) -> list[tuple[str, int]]:
    """Every policy with every count of routers; to who knows everything it makes no difference."""
    everything = [(name, routers) for routers in config.routers for name in CONTENDERS if name != CLAIRVOYANT]
    return [*everything, (CLAIRVOYANT, 1)]


def rows_of(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """As a table shows them."""
    return [
        [
            row["policy"],
            str(row["routers"]),
            *(f"{row[key]:.3f}" for key in ("queue_p50_s", "queue_p99_s", "ttft_p50_s", "ttft_p99_s")),
            f"{row['imbalance']:.2f}",
            f"{100 * row['hit_rate']:.1f}",
            str(row["refusals"]),
        ]
        for row in rows
    ]


HEADER = (
    "policy",
    "routers",
    "queue p50 s",
    "p99",
    "TTFT p50 s",
    "p99",
    "busiest / mean",
    "hits %",
    "refusals",
)
