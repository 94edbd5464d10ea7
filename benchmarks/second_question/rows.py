"""From outcomes to the figures of each way, policy, retention and group of pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

from benchmarks.quality.setting import ALL_TASKS, Setting
from benchmarks.quality.setting import FULL as UNTOUCHED
from benchmarks.report import wilson_interval
from benchmarks.second_question.outcome import FULL, WAYS, Agreement, Outcome

APART = "apart"
"""Pairs whose answers lie on different patches."""
SHARED = "shared"
"""Pairs whose answers have patches in common."""


def answer_rows(outcomes: Iterable[Outcome], settings: Iterable[Setting], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """One per way, setting and group that has pairs: all of them, those apart, those that share patches, each task."""
    keys = [(FULL, UNTOUCHED), *product(WAYS, settings)]
    by_setting: dict[tuple[str, Setting], list[Outcome]] = {key: [] for key in keys}
    for outcome in outcomes:
        by_setting[outcome.way, outcome.setting].append(outcome)
    return [
        _row(way, setting, group, chosen)
        for (way, setting), found in by_setting.items()
        for group, belongs in _groups(tasks).items()
        if (chosen := [each for each in found if belongs(each)])
    ]


def agreement_rows(agreements: Iterable[Agreement]) -> list[dict[str, Any]]:
    """Per setting, how much of what its own pass kept was kept from the retained prefix, too."""
    by_setting: dict[Setting, list[Agreement]] = defaultdict(list)
    for agreement in agreements:
        by_setting[agreement.setting].append(agreement)
    return [
        {
            "policy": setting.policy,
            "retention": setting.retention,
            "same_kept_share": sum(each.common for each in found) / sum(each.kept for each in found),
            "same_kept_set_share": sum(each.common == each.kept for each in found) / len(found),
        }
        for setting, found in by_setting.items()
    ]


def _groups(tasks: Sequence[str]) -> dict[str, Callable[[Outcome], bool]]:
    def of_task(task: str) -> Callable[[Outcome], bool]:
        return lambda each: each.task == task

    return {
        ALL_TASKS: lambda _: True,
        APART: lambda each: each.apart,
        SHARED: lambda each: not each.apart,
        **{task: of_task(task) for task in tasks},
    }


def _row(way: str, setting: Setting, group: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    right = sum(each.right for each in outcomes)
    low, high = wilson_interval(right, len(outcomes))
    kept = sum(each.compression.kept_bytes for each in outcomes)
    full = sum(each.compression.full_bytes for each in outcomes)
    return {
        "way": way,
        "policy": setting.policy,
        "retention": setting.retention,
        "pairs_of": group,
        "pairs": len(outcomes),
        "exact_match": right / len(outcomes),
        "exact_match_low": low,
        "exact_match_high": high,
        "realised_retention": kept / full,
    }
