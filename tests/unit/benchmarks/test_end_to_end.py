"""The end-to-end benchmark: at retention 1 both sides write the same tokens, so they do the same work."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.end_to_end import EndToEndConfig, Ours, Theirs, measure
from benchmarks.random_llama import build_model
from tests.unit.benchmarks.tiny_models import FLAGS, SIZES, cpu_path, gpu_path

SMALL: dict[str, Any] = {**SIZES, "batch": 3, "prompt": 60, "rows": 10, "new_tokens": 7, "rounds": 2}
STAGES = ["prefill", "parcel", "install", "decode"]


def both_sides(config: EndToEndConfig) -> tuple[Ours, Theirs, torch.Tensor]:
    torch.manual_seed(1)
    model = build_model(config, positions=70)
    # the usual deviation of 0.02 makes all attention uniform, and every prompt would get the same token
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return Ours(config, model), Theirs(config, model), torch.randint(97, (3, 60))


def check_same_tokens(config: EndToEndConfig) -> None:
    ours, theirs, prompts = both_sides(config)
    tokens = ours.generate(prompts)
    assert tokens == theirs.generate(prompts)
    assert [len(row) for row in tokens] == [7, 7, 7]
    assert len(set(map(tuple, tokens))) == 3


@pytest.mark.parametrize("path", [cpu_path, gpu_path])
def test_both_sides_write_the_same_tokens(path: Any) -> None:
    check_same_tokens(path(EndToEndConfig)(**SMALL, retention=1.0))


@pytest.mark.gpu
def test_both_sides_write_the_same_tokens_on_a_gpu() -> None:
    check_same_tokens(EndToEndConfig(**SMALL, retention=1.0, device="cuda"))


@pytest.mark.parametrize("path", [cpu_path, gpu_path])
def test_ours_gives_its_memory_back_and_starts_anew(path: Any) -> None:
    ours, _, prompts = both_sides(path(EndToEndConfig)(**SMALL))
    first = ours.generate(prompts)
    assert ours.generate(prompts) == first
    assert ours._pool.used_bytes == 0
    ours._pool.check_integrity()
    assert list(ours.seconds) == STAGES


def test_figures() -> None:
    found = measure(EndToEndConfig(**SMALL))
    assert found["speed_up"] == pytest.approx(found["hf_s"] / found["ours_s"])
    assert sum(found["ours_stages_s"].values()) <= max(found["rounds_s"]["ours"])
    assert [len(found["rounds_s"][side]) for side in ("ours", "hf")] == [2, 2]


def test_it_prints_a_table_and_one_json_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = ["--batch=1", "--prompt=60", "--rows=10", "--new-tokens=3", "--rounds=1", "--json=-"]
    monkeypatch.setattr(sys, "argv", ["end_to_end", *FLAGS, *flags])
    end_to_end.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["workload"]["rows"] == 10
    assert [line.split()[1] for line in lines if line.startswith("|")][2:6] == STAGES


@pytest.mark.parametrize(("wrong", "message"), [({"new_tokens": 1}, "new_tokens"), ({"rows": 60}, "rows")])
def test_impossible_settings_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EndToEndConfig(**{**SMALL, **wrong})
