"""Pages of quality runs: committed ones are what their JSON gives, and what is written by hand stays."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import held_out
from benchmarks.quality import page as command
from benchmarks.quality.overview import of_several_images, ranked
from benchmarks.quality.page import BEGIN, END, blank_page, figures, with_figures

RESULTS = Path(command.__file__).parents[1] / "results"
PAGES = [page for page in sorted(RESULTS.glob("*.md")) if BEGIN in page.read_text(encoding="utf-8")]


def row(policy: str, retention: float, task: str, share: float) -> dict[str, Any]:
    bounds = {"exact_match_low": share - 0.1, "exact_match_high": share + 0.1}
    more = {"agreement": 0.5, "log_probability_gap": 1.5, "realised_retention": retention - 0.001}
    return {"policy": policy, "retention": retention, "task": task, "exact_match": share, **bounds, **more}


def run(*retentions: float) -> dict[str, Any]:
    rows = [row("full", 1.0, task, 1.0) for task in ("read", "read_in_four", "which", "all")]
    for policy, share in (("worse", 0.2), ("better:a=1,b=2", 0.4)):
        for retention in retentions:
            tasks = {"read": share, "read_in_four": share + retention, "which": share, "all": share}
            rows += [row(policy, retention, task, found) for task, found in tasks.items()]
    machine = {"cpu": "A Chip", "cores": 2, "memory_gib": 8, "python": "3.11", "commit": "abc1234"}
    versions = {"torch": "2", "transformers": "5", "numpy": "2"}
    workload = {"samples": 30, "seed": 7, "scope": "cache", "dtype": "auto"}
    return {
        "benchmark": "quality",
        "workload": workload,
        "results": rows,
        "environment": {**machine, "versions": versions},
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_committed_page_is_what_its_result_gives(page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    made = held_out.figures(found) if isinstance(found, list) else figures(found)
    assert with_figures(written, made) == written


def test_some_page_is_committed() -> None:
    assert PAGES


def test_the_command_is_the_run() -> None:
    shown = figures(run(0.2, 0.05)).split("```")[1].replace("\\\n", " ").split()
    flags = "--samples 30 --seed 7 --retentions 0.2 0.05 --scope cache --tasks read read_in_four which"
    expected = f"python -m benchmarks.quality {flags} --policies worse better:a=1,b=2 --json -"
    assert shown == expected.split()


def test_the_best_come_first_with_their_intervals() -> None:
    lines = [line for line in figures(run(0.2, 0.05)).splitlines() if line.startswith("| `")]
    assert lines[:3] == [
        "| `full` | 100.0 [90, 110] |  |  |  |  |",
        "| `better:a=1,b=2` | 40.0 [30, 50] | 40.0 [30, 50] | 50.0 % | 1.50 | 4.90 % |",
        "| `worse` | 20.0 [10, 30] | 20.0 [10, 30] | 50.0 % | 1.50 | 4.90 % |",
    ]
    assert lines[3:] == [
        "| `full` | 100 | 100 | 100 | 100 |",
        "| `better:a=1,b=2` | 40 | 45 | 40 | 40 |",
        "| `worse` | 20 | 25 | 20 | 20 |",
    ]


def test_small_retentions_are_shown_where_they_are_more_than_the_floor() -> None:
    found = run(0.1, 0.02, 0.01)
    shares = of_several_images(found["results"])
    assert shares == {
        ("worse", 0.02): pytest.approx(0.21),
        ("worse", 0.01): pytest.approx(0.205),
        ("better:a=1,b=2", 0.02): pytest.approx(0.41),
        ("better:a=1,b=2", 0.01): pytest.approx(0.405),
    }
    last = figures(found).split("## Questions about several images")[1]
    assert "| `better:a=1,b=2` | 41.0 | 40.5 |" in last
    assert "several images" not in figures(run(0.1))
    assert ranked(found["results"]) == ["better:a=1,b=2", "worse"]


def test_what_is_written_by_hand_stays() -> None:
    page = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    once = with_figures(page, figures(run(0.1)))
    assert once.startswith(f"before\n\n{BEGIN}\n\n```")
    assert once.endswith(f"|\n\n{END}\n\nafter\n")
    assert with_figures(once, figures(run(0.1))) == once
    assert "old" not in once


def test_the_command_makes_a_page_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tmp_path / "quality_here.json"
    result.write_text(json.dumps(run(0.1)))
    monkeypatch.setattr(sys, "argv", ["page", str(result)])
    command.main()
    assert (tmp_path / "quality_here.md").read_text() == with_figures(blank_page("quality_here"), figures(run(0.1)))


@pytest.mark.parametrize("broken", ["other", "guarded", "no marks"])
def test_what_has_no_page_is_a_sentence(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(0.1)
    if broken == "other":
        found["benchmark"] = "serve"
    if broken == "guarded":
        found["results"][-1]["max_dropped_attention"] = 0.1
    if broken == "no marks":
        (tmp_path / "a.md").write_text("by hand")
    (tmp_path / "a.json").write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["page", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit, match=r"^no page of .*a\.json: (one run of|the page has no)"):
        command.main()
