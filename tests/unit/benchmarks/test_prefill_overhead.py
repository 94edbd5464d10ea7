"""The prefill benchmark: every variant goes as far as it says, and its figures fit together."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from benchmarks import prefill_overhead
from benchmarks.prefill_overhead import STAGES, VARIANTS, Passes, PrefillOverheadConfig, measure
from tests.unit.benchmarks.tiny_models import FLAGS, SIZES, gpu_path

SMALL: dict[str, Any] = {**SIZES, "prompt": 60, "rows": 10, "rounds": 2}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_the_stages_up_to_its_own(variant: str) -> None:
    passes = Passes(PrefillOverheadConfig(**SMALL))
    passes.run(variant)
    done = [stage for stage in STAGES if passes.stages_ms[stage]]
    assert done == list(STAGES[: VARIANTS.index(variant)])
    assert all(passes.shares[stage][0] > 0 for stage in done)
    assert bool(passes._body.tobytes().strip(b"\0")) == (variant == "parcel")


def test_all_rows_after_the_image_are_observed() -> None:
    config = PrefillOverheadConfig(**{**SMALL, "prompt": 200, "rows": 130})
    passes = Passes(config)
    prefilled = passes._prefill(passes._policy)
    for layer in prefilled.observed(passes._prompt.shape):
        mass = passes._policy.score(layer).sum().item()
        assert mass == pytest.approx(130 * config.text.query_heads, rel=1e-4)


def test_figures() -> None:
    found = measure(PrefillOverheadConfig(**SMALL))
    for stage in STAGES:
        assert found[f"{stage}_overhead"] == pytest.approx(found[f"{stage}_ms"] / found["plain_ms"] - 1)
    shares = found["stage_shares"]
    assert found["statistics_and_selection_share"] == shares["statistics"]["p50"] + shares["selection"]["p50"]
    assert (found["rows"], found["prompt"], found["dtype"]) == (10, 60, "float32")


def test_a_gpu_has_no_stages_within_a_pass() -> None:
    found = measure(gpu_path(PrefillOverheadConfig)(**SMALL))
    assert not {"stages_cpu_ms", "stage_shares"} & set(found)
    assert "| statistics |" in prefill_overhead._report(found)


@pytest.mark.gpu
def test_it_runs_on_a_gpu() -> None:
    torch.manual_seed(0)
    found = measure(PrefillOverheadConfig(**{**SMALL, "dtype": "bfloat16", "device": "cuda"}))
    assert found["plain_ms"] > 0


def test_it_prints_a_table_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--prompt=60", "--rows=10", "--rounds=2", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["prefill_overhead", *FLAGS, *flags])
    prefill_overhead.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["workload"]["rows"] == 10
    assert [line.split()[1] for line in lines if line.startswith("|")][2:] == list(VARIANTS)


@pytest.mark.parametrize("rows", [0, 60])
def test_impossible_settings_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        PrefillOverheadConfig(**{**SMALL, "rows": rows})
