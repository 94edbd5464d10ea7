"""The picture of a stored result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.plot import Panel, bar_chart

# The blind ones are in the tables: their bars would leave no room for the others'.
SHOWN = ("least_loaded", "power_of_two", "image_affinity", "clairvoyant")


def placement_chart(results: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> str:
    """What requests wait by policy, a bar per count of routers; who knows everything has one for all."""

    def panel(title: str, key: str, *, factor: float = 1.0, digits: int = 2) -> Panel:
        return Panel(
            title=title,
            groups={
                policy: {_series(row): factor * row[key] for row in results if row["policy"] == policy}
                for policy in SHOWN
            },
            digits=digits,
        )

    return bar_chart(
        title="Placement by policies that look at loads, simulated",
        notes=notes,
        series=list(dict.fromkeys(_series(row) for row in results)),
        panels=[
            panel("TTFT, median, s", "ttft_p50_s"),
            panel("TTFT, p99, s", "ttft_p99_s"),
            panel("images found again, %", "hit_rate", factor=100, digits=0),
        ],
    )


def _series(row: Mapping[str, Any]) -> str:
    return "1 router" if row["routers"] == 1 else f"{row['routers']} routers"
