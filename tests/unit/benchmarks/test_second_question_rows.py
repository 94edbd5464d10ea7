"""The benchmark of a second question: figures, tables, settings, and the command."""

from __future__ import annotations

import json
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
from vlcache.v1 import inference_pb2 as public

from benchmarks.picture import picture
from benchmarks.quality.setting import FULL as UNTOUCHED
from benchmarks.quality.setting import Setting
from benchmarks.second_question import __main__ as command
from benchmarks.second_question.config import COMPARED, SecondQuestionConfig
from benchmarks.second_question.cost import Cost, cost_rows
from benchmarks.second_question.outcome import FULL, OTHER, OWN, PREFIX, SAME, WAYS, Agreement, Outcome
from benchmarks.second_question.rows import agreement_rows, answer_rows
from benchmarks.second_question.runner import SecondQuestionRunner
from benchmarks.second_question.tables import tables

KEPT = Setting("some", 0.1)


def outcome(way: str, right: bool, *, task: str = "read", apart: bool = True, kept: int = 10) -> Outcome:
    return Outcome(
        way=way,
        setting=UNTOUCHED if way == FULL else KEPT,
        task=task,
        apart=apart,
        right=right,
        compression=public.Compression(kept_bytes=kept, full_bytes=100),
    )


def cost(images: int, whole_ms: float, text_ms: float) -> Cost:
    return Cost(
        images=images,
        prompt_tokens=100 * images,
        text_tokens=10,
        whole_ms=whole_ms,
        vision_ms=whole_ms / 4,
        text_ms=text_ms,
        prefix_kv_bytes=2**20 * images,
        prefix_query_bytes=2**20,
    )


OUTCOMES = [
    outcome(FULL, True),
    outcome(FULL, True, task="list", apart=False),
    *(outcome(way, True, kept=kept) for way, kept in zip(WAYS, (10, 10, 11, 12), strict=True)),
    *(outcome(way, way != OTHER, task="list", apart=False, kept=12) for way in WAYS),
]
ANSWERS = answer_rows(OUTCOMES, [KEPT], ("read", "list"))
AGREEMENTS = [Agreement(setting=KEPT, kept=100, common=100), Agreement(setting=KEPT, kept=300, common=240)]


def test_answers_are_counted_by_way_and_group() -> None:
    found = {(row["way"], row["pairs_of"]): (row["pairs"], row["exact_match"]) for row in ANSWERS}
    groups = {"all": 2, "apart": 1, "shared": 1, "read": 1, "list": 1}
    assert set(found) == {(way, group) for way in (FULL, *WAYS) for group in groups}
    assert {key: pairs for key, (pairs, _) in found.items()} == {key: groups[key[1]] for key in found}
    shares = {group: found[OTHER, group][1] for group in groups}
    assert shares == {"all": 0.5, "apart": 1, "shared": 0, "read": 1, "list": 0}
    assert all(found[way, "all"][1] == 1 for way in (FULL, OWN, PREFIX, SAME))
    (other,) = (row for row in ANSWERS if (row["way"], row["pairs_of"]) == (OTHER, "all"))
    assert other["realised_retention"] == 0.12
    assert 0 < other["exact_match_low"] < 0.5 < other["exact_match_high"] < 1


def test_a_group_without_pairs_has_no_row() -> None:
    found = answer_rows([outcome(FULL, True)], [KEPT], ("read", "list"))
    assert [row["pairs_of"] for row in found] == ["all", "apart", "read"]


def test_agreement_is_of_tokens_and_of_whole_sets() -> None:
    (row,) = agreement_rows(AGREEMENTS)
    assert row == {"policy": "some", "retention": 0.1, "same_kept_share": 0.85, "same_kept_set_share": 0.5}


def test_costs_are_medians_by_number_of_images() -> None:
    rows = cost_rows([cost(2, 90, 9), cost(1, 30, 10), cost(1, 10, 1), cost(1, 50, 2)])
    assert [(row["images"], row["pairs"], row["whole_ms"], row["text_ms"]) for row in rows] == [
        (1, 3, 30, 2),
        (2, 1, 90, 9),
    ]
    assert [row["ratio"] for row in rows] == [15, 10]
    assert [row["prefix_kv_bytes_mean"] for row in rows] == [2**20, 2**21]


def test_tables_show_every_way() -> None:
    shown = tables(ANSWERS, agreement_rows(AGREEMENTS), cost_rows([cost(1, 30, 10)]))
    assert "with the full cache 100.0 [34, 100]" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("| some | 0.1 | 100.0"))
    assert line.split(" | ")[2:6] == ["100.0 [34, 100]"] * 3 + ["50.0 [9, 91]"]
    assert line.endswith("11.0 / 11.5 / 12.0 |")
    assert "| 1 | 100 | 10.0 | 30.0 | 7.5 | 10.0 | 3.0 | 1.0 | 1.0 |" in shown
    assert "| some | 0.1 | 85.00 | 50.00 |" in shown


def test_a_group_that_is_missing_leaves_its_cells_empty() -> None:
    only = answer_rows([outcome(way, True) for way in (FULL, *WAYS)], [KEPT], ("read",))
    (line,) = (line for line in tables(only, [], []).splitlines() if line.startswith("| some"))
    assert line.split(" | ")[8:10] == ["", ""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ("elastic_cache",)}, "elastic_cache does not only select"),
        ({"policies": ("h2o",)}, "does not only select"),
        ({"policies": ("fast_v",)}, "does not only select"),
        ({"policies": ("oracle",)}, "does not only select"),
        ({"policies": ("dance",)}, "dance"),
        ({"policies": ("vl_cache:threshold=2",)}, "threshold"),
        ({"policies": ()}, "at least one policy"),
        ({"retentions": (1.0,)}, "below 1"),
        ({"retentions": (1.5,)}, "retention"),
        ({"tasks": ("dance",)}, "unknown tasks"),
        ({"pairs": 3}, "one pair per task"),
        ({"max_new_tokens": 1}, "at least 2"),
        ({"batch": 0}, "batch"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SecondQuestionConfig(**changes)


def test_settings_are_policies_by_retentions() -> None:
    assert len(SecondQuestionConfig().settings) == len(COMPARED) * 3


def test_a_batch_of_one_gives_the_same_answers() -> None:
    settings: dict[str, Any] = {"pairs": 1, "tasks": ("shape",), "policies": ("vl_cache",), "dtype": "float32"}
    found = []
    for batch in (1, 16):
        config = SecondQuestionConfig(**settings, retentions=(0.1,), batch=batch, max_new_tokens=12, kv_memory_mib=32)
        runner = SecondQuestionRunner(config)
        outcomes = list(runner.outcomes())
        assert len(runner.costs) == len(runner.agreements) == config.pairs
        found.append(sorted((each.task, each.way, each.right) for each in outcomes))
    assert found[0] == found[1]
    assert len(found[0]) == 1 + len(WAYS)
    assert [right for _, way, right in found[0] if way == FULL] == [True]


def test_it_prints_tables_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--pairs=1", "--tasks", "shape", "--policies", "snap_kv", "--retentions", "0.1"]
    flags += ["--kv-memory-mib=32", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["second_question", *flags])
    command.main()
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["benchmark"] == "second_question"
    assert {row["way"] for row in found["results"]} == {FULL, *WAYS}
    assert len([line for line in lines if line.startswith("| snap_kv")]) == 2
    assert [row["images"] for row in found["costs"]] == [1]


def test_the_picture_compares_who_the_images_were_kept_for() -> None:
    costs = cost_rows([cost(1, 30, 10), cost(4, 99, 11)])
    where = {"cpu": "some", "cores": 2, "memory_gib": 1, "commit": "abc"}
    found = {
        "benchmark": "second_question",
        "workload": {"pairs": 2, "model": "some"},
        "results": ANSWERS,
        "costs": costs,
        "environment": where,
    }
    shown = [each.text for each in ElementTree.fromstring(picture(found)).iter("{http://www.w3.org/2000/svg}text")]
    first = shown.index("some")
    assert shown[first : first + 4] == ["some", "100.0", "100.0", "50.0"]
    assert shown[-6:] == ["1 image", "30.0", "10.0", "4 images", "99.0", "11.0"]
