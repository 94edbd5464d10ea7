"""The picture of many policies: shaded tables of exact match."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.heat_map import Grid, heat_map
from benchmarks.quality.overview import Row, at, judged_retention, of_several_images, ranked, retentions_in
from benchmarks.quality.setting import ALL_TASKS, FULL


def quality_map(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Policies by retention over all tasks, and by task where a tenth or about that is kept; the best ones first."""
    compressed = [row for row in rows if row["retention"] < 1]
    policies, judged = ranked(rows), judged_retention(rows)
    overall = _percentages((row for row in compressed if row["task"] == ALL_TASKS), "retention")
    for (policy, kept), share in of_several_images(rows).items():
        overall[policy][_several_images(kept)] = 100 * share
    full = _percentages((row for row in rows if row["policy"] == FULL.policy), "task")
    by_task = _percentages(at(compressed, judged), "task")
    tasks = {**full, **{policy: by_task[policy] for policy in policies}}
    columns = [f"{kept:g}" for kept in retentions_in(rows)]
    columns += sorted({kept for policy in policies for kept in overall[policy]} - set(columns), reverse=True)
    return heat_map(
        title=f"Answers that stay right under compression: {len(policies)} policies",
        notes=notes,
        grids=[
            Grid(
                title="exact match over all tasks, %, by retention",
                columns=columns,
                lines={policy: overall[policy] for policy in policies},
            ),
            Grid(
                title=f"exact match by task, %, at retention {judged:g}",
                columns=list(dict.fromkeys(task for values in tasks.values() for task in values)),
                lines=tasks,
            ),
        ],
    )


def _several_images(retention: float) -> str:
    return f"{retention:g}, 2+ images"


def _percentages(rows: Iterable[Row], key: str) -> dict[str, dict[str, float]]:
    """Exact match per policy and column."""
    lines: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        column = row[key] if isinstance(row[key], str) else f"{row[key]:g}"
        lines[row["policy"]][column] = 100 * row["exact_match"]
    return lines
