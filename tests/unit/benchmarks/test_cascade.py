"""The cascade benchmark: passes that hold less and select the same."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
import torch

from benchmarks import cascade
from benchmarks.cascade import CascadeConfig, Passes, measure
from tests.unit.benchmarks.tiny_models import FLAGS, SIZES

SMALL: dict[str, Any] = {**SIZES, "prompt": 90, "rows": 10, "rounds": 2}


def test_figures() -> None:
    found = measure(CascadeConfig(**SMALL))
    assert list(found["cascades"]) == ["0.05", "0.1", "0.2"]
    for name, figures in found["cascades"].items():
        assert figures["expected_ratio"] == pytest.approx(float(name) + 1 / 3)
        assert 1 / 3 < figures["peak_ratio"] < 1
        assert figures["stage_share"] > 0
    # fp32 keys and values of 3 layers with one head
    assert found["full_bytes"] == 2 * 3 * 90 * 128 * 4


def test_another_selection_is_an_error() -> None:
    passes = Passes(CascadeConfig(**SMALL))
    passes.hold([0.2])
    passes.cascade(0.2)
    first = passes.chosen["0.2"][0]
    assert first.chosen is not None
    passes.chosen["0.2"][0] = dataclasses.replace(first, chosen=torch.zeros_like(first.chosen))
    with pytest.raises(RuntimeError, match="something else"):
        cascade._figures(passes, "0.2", {"full": 1.0, "0.2": 1.0})


def test_it_prints_a_table_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--prompt=90", "--rows=10", "--rounds=2", "--retentions", "0.3", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["cascade", *FLAGS, *flags])
    cascade.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["workload"]["retentions"] == [0.3]
    assert [line.split()[1] for line in lines if line.startswith("|")][2:] == ["1,", "0.3"]


@pytest.mark.parametrize("wrong", [{"rows": 90}, {"retentions": [1.0]}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must lie"):
        CascadeConfig(**{**SMALL, **wrong})
