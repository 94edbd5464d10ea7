"""Leave one kind out: what is chosen, and how much of the gap is closed, on runs made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import held_out as command
from benchmarks.quality.held_out import ORACLE, PUBLISHED, SELECTION, SERVED, Kind, best, figures, gap_closed, kinds_of

SELECTED = "look_ahead:hand_off=false,tokens=4"
POLICIES = ("mix_kv", "tgv_kv", "oracle", "look_ahead", SELECTED)


def row(policy: str, task: str, answers: str, retention: float = 0.1) -> dict[str, Any]:
    share = answers.count("1") / len(answers)
    return {"policy": policy, "retention": retention, "task": task, "answers": answers, "exact_match": share}


def run(answers: dict[str, dict[str, str]]) -> dict[str, Any]:
    """By policy and task; the full cache knows everything but `list`."""
    tasks = list(answers[POLICIES[0]])
    full = [row("full", task, "0001" if task == "list" else "1111", 1.0) for task in tasks]
    rows = [row(policy, task, found) for policy, by_task in answers.items() for task, found in by_task.items()]
    versions = {"torch": "2", "transformers": "5"}
    machine = {
        "cpu": "A Chip",
        "cores": 2,
        "memory_gib": 8,
        "python": "3.11",
        "commit": "abc1234",
        "versions": versions,
    }
    workload = {"samples": 8, "seed": 7, "scope": "cache", "dtype": "auto"}
    return {"benchmark": "quality", "workload": workload, "results": [*full, *rows], "environment": machine}


def tuned() -> dict[str, Any]:
    """mix_kv is better but for the kind `list`, which tgv_kv masters."""
    rest = {policy: {"read": "1110", "shape": "1110", "list": "0000"} for policy in POLICIES[2:]}
    mix, tgv = {"read": "1100", "shape": "1100", "list": "0000"}, {"read": "1000", "shape": "1000", "list": "1111"}
    return run({"mix_kv": mix, "tgv_kv": tgv, **rest})


def fresh(*tasks: str) -> dict[str, Any]:
    answers = {"mix_kv": "0000", "tgv_kv": "1000", "oracle": "1110", "look_ahead": "1111", SELECTED: "1100"}
    return run({policy: dict.fromkeys(tasks, found) for policy, found in answers.items()})


def test_the_kind_that_is_left_out_has_no_say() -> None:
    rows = [row for row in tuned()["results"] if row["retention"] == 0.1]
    assert best(rows, PUBLISHED, without="list") == "mix_kv"
    assert best(rows, PUBLISHED, without="read") == "tgv_kv"
    assert best(rows, PUBLISHED, without="a new kind") == "tgv_kv"
    assert best(rows, ORACLE, without="read") == "oracle"
    assert best(rows, SELECTION, without="read") == SELECTED
    assert best(rows, SERVED, without="read") == "look_ahead"


def test_what_it_answers_comes_from_the_other_runs() -> None:
    kinds = kinds_of([tuned(), fresh("read", "list"), fresh("third_turn")], 0.1)
    assert [(kind.task, kind.known, kind.full) for kind in kinds] == [
        ("read", True, 1.0),
        ("list", True, 0.25),
        ("third_turn", False, 1.0),
    ]
    assert [kind.chosen[PUBLISHED] for kind in kinds] == ["tgv_kv", "mix_kv", "tgv_kv"]
    assert [kind.answers[PUBLISHED].tolist() for kind in kinds[:2]] == [[True, False, False, False], [False] * 4]


def test_the_share_of_the_gap() -> None:
    kinds = kinds_of([tuned(), fresh("read")], 0.1)
    closed, low, high = share_of(kinds, SELECTION)
    assert closed == pytest.approx((0.5 - 0.25) / (0.75 - 0.25))
    assert low < closed < high
    assert share_of(kinds, SERVED)[0] == pytest.approx(1.5)


def test_where_the_oracle_is_no_better_there_is_no_gap() -> None:
    assert gap_closed([kind(published=[True, True], oracle=[True, False], ours=[True, True])], SELECTION) is None


def share_of(kinds: list[Kind], family: str) -> tuple[float, float, float]:
    found = gap_closed(kinds, family)
    assert found is not None
    return found


def kind(**answers: list[bool]) -> Kind:
    names = {"published": PUBLISHED, "oracle": ORACLE, "ours": SELECTION}
    found = {names[name]: np.array(right) for name, right in answers.items()}
    return Kind(task="read", known=True, full=1.0, chosen={}, answers=found)


def test_questions_are_drawn_together() -> None:
    """Ours is right where the oracle is: whatever is drawn, all of the gap is closed."""
    some = [True, False, True, True, False, True, True, True]
    assert gap_closed([kind(published=[False] * 8, oracle=some, ours=some)], SELECTION) == (1.0, 1.0, 1.0)


def test_kinds_count_alike_however_many_questions_they_have() -> None:
    two = [
        kind(published=[False] * 2, oracle=[True] * 2, ours=[True] * 2),
        kind(published=[False] * 20, oracle=[True] * 20, ours=[False] * 20),
    ]
    assert share_of(two, SELECTION)[0] == pytest.approx(0.5)


def test_only_mastered_kinds_count() -> None:
    lines = figures([tuned(), fresh("read", "list"), fresh("third_turn")]).splitlines()
    assert "| list | 25.0 | 0.0 | 75.0 | 50.0 | 100.0 |" in lines
    assert "| **mastered kinds, each left out** | 100.0 | 25.0 | 75.0 | 50.0 | 100.0 |" in lines
    assert "| **mastered new kinds** | 100.0 | 25.0 | 75.0 | 50.0 | 100.0 |" in lines
    assert "| list | `mix_kv` | `oracle` | `look_ahead:hand_off=false,tokens=4` | `look_ahead` |" in lines


def test_only_retentions_that_all_runs_have_are_compared() -> None:
    first = tuned()
    first["results"] += [row(policy, "read", "1111", 0.2) for policy in POLICIES]
    written = figures([first, fresh("read")])
    assert "## At 10 %" in written
    assert "## At 20 %" not in written


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "held_out.json"
    monkeypatch.setattr(sys, "argv", ["held_out", str(runs)])
    runs.write_text(json.dumps([tuned()]))
    with pytest.raises(SystemExit, match=r"^no page of .*: a run to choose by"):
        command.main()
    runs.write_text(json.dumps([tuned(), fresh("read")]))
    command.main()
    assert figures([tuned(), fresh("read")]) in (tmp_path / "held_out.md").read_text()
