"""The benchmark of preprocessing: both ways do the same work."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from benchmarks import preprocessing
from benchmarks.preprocessing import PreprocessingConfig, photograph


def test_it_prints_a_table_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--megapixels=0.5", "--requests=4", "--concurrency=2", "--workers=1", "--rounds=1", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["preprocessing", *flags])
    preprocessing.main()
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert set(found["ways"]) == {"threads", "processes"}
    for figures in found["ways"].values():
        assert figures["late_p50_ms"] <= figures["late_p99_ms"] <= figures["late_max_ms"]
        assert figures["requests_per_s"] > 0
    assert 20 < found["process_peak_mib"] < 1000
    assert len([line for line in lines if line.startswith("|")]) == 4


def test_the_photograph_has_its_size() -> None:
    width, height = Image.open(BytesIO(photograph(2.0))).size
    assert width * height == pytest.approx(2e6, rel=0.01)


@pytest.mark.parametrize("wrong", [{"megapixels": 0}, {"requests": 0}, {"rounds": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        PreprocessingConfig(**wrong)
