"""What a limit of the quality guard costs and what it saves: kept KV beside right answers, per policy and limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.plot import Panel, bar_chart
from benchmarks.quality.setting import ALL_TASKS, FULL
from benchmarks.report import table

Row = Mapping[str, Any]

KEPT, RIGHT, WORST = "kept KV", "right answers, of full", "worst task, of full"


@dataclass(frozen=True, kw_only=True)
class GuardedFigures:
    """One policy and retention under one limit; shares in [0, 1], but for `right` and `worst`, which compare with the
    full cache's exact match and may exceed 1."""

    policy: str
    retention: float
    limit: float
    kept: float
    right: float
    worst: float
    worst_task: str

    @property
    def name(self) -> str:
        """Of the limit."""
        return "no guard" if self.limit == 1 else f"{self.limit:g}"


def guarded_figures(rows: Sequence[Row]) -> list[GuardedFigures]:
    """By policy and retention, then by limit from the loosest on; what the full cache never gets right has no share.

    Args:
        rows: Of one run of `benchmarks.quality`, or of several that measured different settings.
    """
    full = {row["task"]: row["exact_match"] for row in rows if row["policy"] == FULL.policy and row["exact_match"]}
    settings = dict.fromkeys((row["policy"], row["retention"]) for row in rows if row["policy"] != FULL.policy)
    figures = [_figures([row for row in rows if (row["policy"], row["retention"]) == each], full) for each in settings]
    order = list(dict.fromkeys((each.policy, each.retention) for each in figures))
    return sorted(figures, key=lambda each: (order.index((each.policy, each.retention)), -each.limit))


def guard_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        [each.policy, each.name, f"{each.retention:g}", _percent(each.kept), _percent(each.right), worst]
        for each in guarded_figures(rows)
        for worst in [f"{_percent(each.worst)} ({each.worst_task})"]
    ]
    return table(["policy", "limit", "asked", f"{KEPT}, %", f"{RIGHT}, %", f"{WORST}, %"], lines)


def guard_chart(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """SVG: a panel per policy and retention, a group per limit."""
    panels: dict[str, dict[str, dict[str, float | None]]] = {}
    for each in guarded_figures(rows):
        groups = panels.setdefault(f"{each.policy}, {each.retention:g} asked: by the guard's limit, %", {})
        groups[each.name] = {KEPT: 100 * each.kept, RIGHT: 100 * each.right, WORST: 100 * each.worst}
    return bar_chart(
        title="What the quality guard keeps, and the answers that stay right",
        notes=notes,
        series=[KEPT, RIGHT, WORST],
        panels=[Panel(title=title, groups=groups) for title, groups in panels.items()],
    )


def _figures(rows: Sequence[Row], full: Mapping[str, float]) -> GuardedFigures:
    shares = {row["task"]: row["exact_match"] / full[row["task"]] for row in rows if row["task"] in full}
    (overall,) = (row for row in rows if row["task"] == ALL_TASKS)
    worst = min((task for task in shares if task != ALL_TASKS), key=lambda task: shares[task])
    return GuardedFigures(
        policy=overall["policy"].partition(", guard ")[0],
        retention=overall["retention"],
        limit=overall["max_dropped_attention"],
        kept=overall["realised_retention"],
        right=shares[ALL_TASKS],
        worst=shares[worst],
        worst_task=worst,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
