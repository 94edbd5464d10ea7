"""Ratios, tables and settings of the serving benchmark."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.serve.config import ServeBenchConfig
from benchmarks.serve.figures import OK, Outcome, figures
from benchmarks.serve.load import ClosedLoop, OpenLoop
from benchmarks.serve.report import ratios, tables


def row(load: str, retention: float, *, good: int, slow: int, failed: int = 0) -> dict[str, Any]:
    """Figures of a load of ten seconds."""
    answers = [(0.1, 0.2)] * good + [(5.0, 5.1)] * slow
    outcomes = [Outcome(code=OK, arrivals_s=arrivals, kv_full_bytes=1024) for arrivals in answers]
    outcomes += [Outcome(code="RESOURCE_EXHAUSTED")] * failed
    found = figures(outcomes, duration_s=10.0, limits_s={"ttft": 1.0})
    seen = {"mean_kv_used_share": 0.5, "mean_decoding": 2.0, "mean_prefilling": None}
    return {"load": load, "retention": retention, **found, "kv_bytes_per_sequence": 2048.0, **seen}


ROWS = [
    row("2 clients", 1.0, good=4, slow=0),
    row("2 clients", 0.1, good=5, slow=0),
    row("8 clients", 1.0, good=0, slow=3, failed=2),
    row("8 clients", 0.1, good=12, slow=4),
]


def test_ratios_compare_each_retention_at_its_best_load() -> None:
    found = ratios(ROWS)
    assert found["goodput_ratio"] == pytest.approx(12 / 4)
    assert found["throughput_ratio"] == pytest.approx(16 / 4)


def test_ratios_load_by_load_are_none_where_nothing_was_good() -> None:
    light, heavy = ratios(ROWS)["by_load"]
    assert light == {
        "load": "2 clients",
        "goodput_ratio": pytest.approx(5 / 4),
        "throughput_ratio": pytest.approx(5 / 4),
    }
    assert heavy["load"] == "8 clients"
    assert heavy["goodput_ratio"] is None
    assert heavy["throughput_ratio"] == pytest.approx(16 / 3)


def test_ratios_know_the_smallest_of_several_retentions() -> None:
    middle = row("2 clients", 0.5, good=9, slow=0)
    assert ratios([middle, *ROWS[:2]])["goodput_ratio"] == pytest.approx(5 / 4)


def test_tables_show_failures_by_code_and_gaps_as_dashes() -> None:
    text = tables(ROWS)
    assert "| 8 clients | 1 | 3 | 2 RESOURCE_EXHAUSTED | 10.00 | 0.00 | 0.30 | 0.60 |" in text
    assert "| 2 clients | 0.1 | 100.0 / 100.0 | 200.0 / 200.0 | 100.0 / 100.0 |" in text
    assert "| 2 clients | 0.1 | 5.0 KiB | 0 B | 5.0 KiB | 2.0 KiB | 50 % | 2.0 | - |" in text


def test_tables_survive_a_load_without_an_answer() -> None:
    nothing = {**row("8 clients", 1.0, good=0, slow=0, failed=1), "kv_bytes_per_sequence": None}
    assert "| 8 clients | 1 | - / - | - / - |" in tables([nothing])


def test_concurrency_is_a_closed_loop_and_a_rate_an_open_one() -> None:
    assert ServeBenchConfig(concurrency=(1, 3)).loads == (ClosedLoop(1), ClosedLoop(3))
    assert ServeBenchConfig(request_rate=(0.5,), burstiness=2.0).loads == (OpenLoop(0.5, 2.0),)


def test_the_stack_gets_its_settings() -> None:
    stack = ServeBenchConfig(kv_memory_mib=7, dtype="float32", decode_workers=2, threads=1).stack
    assert (stack.kv_memory_mib, stack.decode_workers, stack.threads) == (7, 2, 1)
    assert stack.dtype == "float32"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"tasks": ("dance",)}, "unknown tasks"),
        ({"tasks": ()}, "unknown tasks"),
        ({"retentions": (1.0, 0.0)}, "retentions"),
        ({"retentions": ()}, "retentions"),
        ({"phases": 0}, "phases"),
        ({"phases": 3, "num_prompts": 2}, "phases"),
        ({"concurrency": (0,)}, "concurrency"),
        ({"concurrency": ()}, "concurrency"),
        ({"request_rate": (0.0,)}, "request_rate"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"burstiness": float("inf")}, "burstiness"),
        ({"warmup": -1}, "warmup"),
        ({"goodput": ("itl:3",)}, "itl:3"),
    ],
)
def test_a_wrong_setting_is_a_sentence(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        ServeBenchConfig(**setting)
