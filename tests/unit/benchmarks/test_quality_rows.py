"""Figures and tables of the quality benchmark from outcomes made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as public

from benchmarks.quality.outcome import Outcome
from benchmarks.quality.rows import Figures
from benchmarks.quality.setting import FULL, Setting
from benchmarks.quality.tables import tables
from benchmarks.report import wilson_interval

KEPT = Setting("some:window=4", 0.1)


def outcome(setting: Setting, task: str, right: bool, *, kept: int = 10, **changes: Any) -> Outcome:
    compression = public.Compression(full_bytes=100, kept_bytes=kept, layer_attention_mass=[0.25, 0.5])
    values = {"question": 0, "agreement": 1.0, "gap": 0.0, "compression": compression, **changes}
    return Outcome(setting=setting, task=task, right=right, **values)


def rows() -> list[dict[str, Any]]:
    figures = Figures([FULL, KEPT], ["read", "count"])
    for task in ("read", "count"):
        figures.add(outcome(FULL, task, True, kept=100))
    figures.add(outcome(KEPT, "read", True, agreement=0.75, gap=1.0, question=2))
    figures.add(outcome(KEPT, "read", False, agreement=0.25, gap=4.0, kept=20))
    figures.add(outcome(KEPT, "count", False, agreement=0.0, gap=-0.5))
    return figures.rows()


def test_a_row_per_setting_and_task_and_one_for_all() -> None:
    keys = [(row["policy"], row["retention"], row["task"], row["samples"]) for row in rows()]
    full = [("full", 1.0, "read", 1), ("full", 1.0, "count", 1), ("full", 1.0, "all", 2)]
    some = [("some:window=4", 0.1, "read", 2), ("some:window=4", 0.1, "count", 1), ("some:window=4", 0.1, "all", 3)]
    assert keys == full + some


def test_columns() -> None:
    row = rows()[3]
    low, high = wilson_interval(1, 2)
    assert row == pytest.approx(
        {
            "policy": "some:window=4",
            "retention": 0.1,
            "max_dropped_attention": 1.0,
            "task": "read",
            "samples": 2,
            "answers": "01",
            "exact_match": 0.5,
            "exact_match_low": low,
            "exact_match_high": high,
            "agreement": 0.5,
            "log_probability_gap": 2.5,
            "realised_retention": 0.15,
            "kept_bytes_mean": 15,
            "kept_attention_mass": 0.375,
        }
    )


def test_tables_show_policies_by_retention_then_by_task() -> None:
    lines = [line for line in tables(rows()).splitlines() if line]
    assert lines == [
        "Exact match over all tasks, %, by retention",
        "| policy | 1 | 0.1 |",
        "| --- | --- | --- |",
        "| full | 100.0 |  |",
        "| some:window=4 |  | 33.3 |",
        "Exact match at retention 1, %",
        "| policy | read | count | all |",
        "| --- | --- | --- | --- |",
        "| full | 100.0 | 100.0 | 100.0 |",
        "Exact match at retention 0.1, %",
        "| policy | read | count | all |",
        "| --- | --- | --- | --- |",
        "| some:window=4 | 50.0 | 0.0 | 33.3 |",
    ]
