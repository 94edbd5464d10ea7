"""The benchmark of repeated images: every way is asked everything, and only the second question gains."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from benchmarks import image_reuse
from benchmarks.image_reuse import KEEPS, ImageReuseConfig


def test_it_prints_a_table_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--pairs=2", "--tasks", "read", "--dtype=float32", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["image_reuse", *flags])
    image_reuse.main()
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [(row["images"], row["kept"], row["pairs"]) for row in found["results"]] == [(1, name, 2) for name in KEEPS]
    for row in found["results"]:
        assert row["same_first_token_share"] == row["same_kept_share"] == 1
        assert 0 < row["second_ms"]["p5"] <= row["second_ms"]["p95"]
    assert found["results"][0]["second_of_none"] == 1
    # a pass over 30 instead of 600 tokens, and no vision tower
    assert found["results"][2]["pass_of_none"] < 0.8
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(KEEPS)


def test_too_few_pairs_for_percentiles_are_refused() -> None:
    with pytest.raises(ValueError, match="two pairs per task"):
        ImageReuseConfig(pairs=3, tasks=("read", "count"))
