"""From outcomes to the figures of each policy, retention and task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from benchmarks.quality.outcome import Outcome
from benchmarks.quality.setting import ALL_TASKS, Setting
from benchmarks.report import wilson_interval


class Figures:
    """Outcomes by setting and task."""

    def __init__(self, settings: Iterable[Setting], tasks: Sequence[str]) -> None:
        self._tasks = tasks
        self._outcomes: dict[Setting, list[Outcome]] = {setting: [] for setting in settings}

    def add(self, outcome: Outcome) -> None:
        """Counts it."""
        self._outcomes[outcome.setting].append(outcome)

    def rows(self) -> list[dict[str, Any]]:
        """One per setting and task, and one with the task `all`."""
        return [
            _row(setting, task, [each for each in outcomes if task in (ALL_TASKS, each.task)])
            for setting, outcomes in self._outcomes.items()
            for task in (*self._tasks, ALL_TASKS)
        ]


def _row(setting: Setting, task: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    right = sum(each.right for each in outcomes)
    low, high = wilson_interval(right, len(outcomes))
    reports = [each.compression for each in outcomes]
    full, kept = sum(report.full_bytes for report in reports), sum(report.kept_bytes for report in reports)
    masses = [fmean(report.layer_attention_mass) for report in reports]
    return {
        "policy": setting.label,
        "retention": setting.retention,
        "max_dropped_attention": setting.max_dropped_attention,
        "task": task,
        "samples": len(outcomes),
        "answers": "".join("01"[each.right] for each in sorted(outcomes, key=lambda each: each.question)),
        "exact_match": right / len(outcomes),
        "exact_match_low": low,
        "exact_match_high": high,
        "agreement": fmean(each.agreement for each in outcomes),
        "log_probability_gap": fmean(each.gap for each in outcomes),
        "realised_retention": kept / full,
        "kept_bytes_mean": kept / len(reports),
        "kept_attention_mass": fmean(masses),
    }
