"""The picture of many policies: shaded tables of exact match."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.heat_map import Grid, heat_map
from benchmarks.quality.setting import ALL_TASKS, FULL

Row = Mapping[str, Any]


def contenders_in(rows: Iterable[Row]) -> list[str]:
    """The policies that compress."""
    return list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != FULL.policy))


def quality_map(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Policies by retention over all tasks, and by task where a tenth or about that is kept; the best ones first."""
    compressed = [row for row in rows if row["retention"] < 1]
    retentions = sorted({row["retention"] for row in compressed}, reverse=True)
    nearest = min(retentions, key=lambda kept: abs(kept - 0.1))
    overall = _percentages((row for row in compressed if row["task"] == ALL_TASKS), "retention")
    lines = dict(sorted(overall.items(), key=lambda line: -sum(line[1].values())))
    full = _percentages((row for row in rows if row["policy"] == FULL.policy), "task")
    by_task = _percentages((row for row in compressed if row["retention"] == nearest), "task")
    tasks = {**full, **{policy: by_task[policy] for policy in lines}}
    return heat_map(
        title=f"Answers that stay right under compression: {len(lines)} policies",
        notes=notes,
        grids=[
            Grid(
                title="exact match over all tasks, %, by retention",
                columns=[f"{kept:g}" for kept in retentions],
                lines=lines,
            ),
            Grid(
                title=f"exact match by task, %, at retention {nearest:g}",
                columns=list(dict.fromkeys(task for values in tasks.values() for task in values)),
                lines=tasks,
            ),
        ],
    )


def _percentages(rows: Iterable[Row], key: str) -> dict[str, dict[str, float]]:
    """Exact match per policy and column."""
    lines: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        column = row[key] if isinstance(row[key], str) else f"{row[key]:g}"
        lines[row["policy"]][column] = 100 * row["exact_match"]
    return dict(lines)
