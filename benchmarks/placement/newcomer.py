"""An empty worker that comes to a busy fleet: what it is sent at first."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.placement.config import PlacementConfig
from benchmarks.placement.figures import quantile
from benchmarks.placement.simulation import Outcome, Simulation
from benchmarks.placement.trace import Trace

POLICY = "least_loaded"
# Long enough for the slowest start, and short enough to be about the start.
WATCHED_S = 10.0


def newcomers(config: PlacementConfig, trace: Trace, progress: Callable[[], object]) -> list[dict[str, Any]]:
    """One row per count of routers and slow start; the newcomer is as fast as the others are in the mean."""
    speeds = trace.prefill_tokens_per_s
    trace = dataclasses.replace(trace, prefill_tokens_per_s=[statistics.fmean(speeds), *speeds[1:]])
    rows = []
    for routers in config.routers:
        for slow_start_s in config.slow_starts_s:
            run = Simulation(config, trace, POLICY, routers, newcomer_at_s=_middle_s(trace), slow_start_s=slow_start_s)
            run.run(progress)
            run.check_integrity()
            rows.append({"routers": routers, "slow_start_s": slow_start_s, **_first_seconds(run, _middle_s(trace))})
    return rows


def newcomer_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """As a table shows them."""
    return [
        [
            str(row["routers"]),
            f"{row['slow_start_s']:g}",
            f"{row['most_per_second_over_mean']:.1f}",
            "-" if row["newcomer_queue_p99_s"] is None else f"{row['newcomer_queue_p99_s']:.3f}",
            f"{row['others_queue_p99_s']:.3f}",
        ]
        for row in rows
    ]


NEWCOMER_HEADER = (
    "routers",
    "slow start s",
    "most requests in 1 s / mean",
    "its queue p99 s",
    "others' p99 s",
)


def _middle_s(trace: Trace) -> float:
    return trace.requests[len(trace.requests) // 2].at_s


def _first_seconds(run: Simulation, from_s: float) -> dict[str, Any]:
    watched = [each for each in run.outcomes.values() if from_s <= each.placed_s < from_s + WATCHED_S]
    own = [each for each in watched if each.prefill == 0]
    seconds = range(round(WATCHED_S))
    most = max(_in_second(own, from_s, n) / max(1, _in_second(watched, from_s, n)) for n in seconds)
    return {
        "most_per_second_over_mean": most * len(run.prefill),
        "newcomer_queue_p99_s": quantile([each.queue_s for each in own], 0.99) if own else None,
        "others_queue_p99_s": quantile([each.queue_s for each in watched if each.prefill], 0.99),
    }


def _in_second(outcomes: Sequence[Outcome], from_s: float, number: int) -> int:
    return sum(from_s + number <= each.placed_s < from_s + number + 1 for each in outcomes)
