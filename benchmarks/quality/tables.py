"""Tables for people: all tasks together by retention, then task by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.quality.guard import guard_table
from benchmarks.quality.setting import ALL_TASKS
from benchmarks.report import table

Row = Mapping[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """Markdown: exact match in %, policy x retention over all tasks, then policy x task at each retention."""
    retentions = sorted({row["retention"] for row in rows}, reverse=True)
    overall = [row for row in rows if row["task"] == ALL_TASKS]
    parts = ["Exact match over all tasks, %, by retention", _grid(overall, "retention", lambda kept: f"{kept:g}")]
    for retention in retentions:
        parts += [f"Exact match at retention {retention:g}, %", _grid(_at(rows, retention), "task", str)]
    if any(row["max_dropped_attention"] < 1 for row in rows):
        parts += ["What the quality guard keeps", guard_table(rows)]
    return "\n\n".join(parts)


def _at(rows: Sequence[Row], retention: float) -> list[Row]:
    return [row for row in rows if row["retention"] == retention]


def _grid(rows: Sequence[Row], key: str, named: Callable[[Any], str]) -> str:
    """A line per policy, a column per value of `key`."""
    columns = list(dict.fromkeys(row[key] for row in rows))
    if key == "retention":
        columns.sort(reverse=True)
    cells = {(row["policy"], row[key]): f"{100 * row['exact_match']:.1f}" for row in rows}
    policies = dict.fromkeys(row["policy"] for row in rows)
    lines = [[policy, *(cells.get((policy, column), "") for column in columns)] for policy in policies]
    return table(["policy", *map(named, columns)], lines)
