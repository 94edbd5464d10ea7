"""The guard's curve: kept KV and right answers per limit, from the rows of the quality benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.charts import quality
from benchmarks.quality.config import QualityConfig
from benchmarks.quality.guard import guard_table, guarded_figures
from benchmarks.quality.setting import Setting
from benchmarks.quality.tables import tables

ENVIRONMENT = {"cpu": "a CPU", "cores": 2, "memory_gib": 4, "commit": "abc"}


def row(setting: Setting, task: str, right: float, kept: float) -> dict[str, Any]:
    return {
        "policy": setting.label,
        "retention": setting.retention,
        "max_dropped_attention": setting.max_dropped_attention,
        "task": task,
        "exact_match": right,
        "realised_retention": kept,
    }


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    figures = {
        Setting("full", 1.0): [("read", 0.8, 1.0), ("never", 0.0, 1.0), ("all", 0.5, 1.0)],
        Setting("some", 0.1): [("read", 0.2, 0.1), ("never", 0.0, 0.1), ("all", 0.1, 0.1)],
        Setting("some", 0.1, 0.03): [("read", 0.6, 0.5), ("never", 0.5, 0.3), ("all", 0.55, 0.4)],
    }
    return [row(setting, *values) for setting, listed in figures.items() for values in listed]


def test_shares_are_of_what_the_full_cache_gets_right(rows: list[dict[str, Any]]) -> None:
    plain, guarded = guarded_figures(rows)
    assert (plain.policy, plain.name, plain.kept, plain.worst_task) == ("some", "no guard", 0.1, "read")
    assert (plain.right, plain.worst) == pytest.approx((0.2, 0.25))
    assert (guarded.policy, guarded.name, guarded.kept) == ("some", "0.03", 0.4)
    assert (guarded.right, guarded.worst) == pytest.approx((1.1, 0.75))


def test_it_is_told_and_drawn(rows: list[dict[str, Any]]) -> None:
    assert "| some | 0.03 | 0.1 | 40.0 | 110.0 | 75.0 (read) |" in guard_table(rows)
    assert guard_table(rows) in tables(rows)
    assert guard_table(rows[:6]) not in tables(rows[:6])
    found = {
        "benchmark": "quality",
        "workload": {"samples": 3, "model": "m"},
        "environment": ENVIRONMENT,
        "results": rows,
    }
    assert "some, 0.1 asked: by the guard's limit, %" in quality([found]).replace("&#x27;", "'")


def test_settings_are_policies_by_retentions_by_limits() -> None:
    config = QualityConfig(policies=("vl_cache", "snap_kv"), retentions=(0.2, 0.1), max_dropped_attention=(1.0, 0.03))
    settings = config.settings(config.contenders)
    assert len(settings) == 8
    assert settings[1] == Setting("vl_cache", 0.2, 0.03)
    assert [setting.label for setting in settings[:2]] == ["vl_cache", "vl_cache, guard 0.03"]


@pytest.mark.parametrize("limits", [(), (1.5,)])
def test_limits_are_checked(limits: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"limit|max_dropped_attention"):
        QualityConfig(max_dropped_attention=limits)
