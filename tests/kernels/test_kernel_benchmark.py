"""The kernel benchmark's own code, tiny and on the CPU: its figures mean nothing here."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator

import pytest
import torch

from benchmarks.kernels import __main__ as benchmark
from benchmarks.kernels import cases
from benchmarks.kernels.cases import Case, all_cases
from benchmarks.kernels.config import KernelsConfig
from benchmarks.kernels.inputs import block_cache, kept_lengths
from shared.kernels.dispatch import REFERENCE, kernels_for

TINY = {
    "device": "cpu",
    "dtype": "float32",
    "batch": 2,
    "query_heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "layers": 2,
    "prompt": 40,
    "rows": 8,
    "block_size": 16,
    "copy_mib": 1,
    "rounds": 2,
}
CONFIG = KernelsConfig(**TINY)
MOVES_MEMORY = {"copy", "attention_full", "attention_kept", "append_full", "append_kept", "gather"}
QUESTIONS = MOVES_MEMORY | {"statistics"}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_main(monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["benchmarks.kernels", *arguments])
    benchmark.main()


def test_it_prints_a_table_and_one_json_line(monkeypatch, capsys) -> None:
    run_main(monkeypatch, **TINY, json="-")
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert {**found["workload"], "json": None} == dataclasses.asdict(CONFIG)
    assert set(found["questions"]) == QUESTIONS
    for question, contenders in found["questions"].items():
        for figures in contenders.values():
            assert 0 < figures["p5_ms"] <= figures["p50_ms"] <= figures["p95_ms"]
            assert ("of_copy" in figures) == (question in MOVES_MEMORY)
    assert found["questions"]["copy"]["device"]["of_copy"] == 1
    assert len([line for line in lines if line.startswith("|")]) == 2 + sum(map(len, found["questions"].values()))


def test_bytes_are_those_of_the_kept_tokens() -> None:
    torch.manual_seed(0)
    lengths = kept_lengths(CONFIG)
    cache = block_cache(CONFIG, lengths)
    assert cache.kv_bytes == 2 * int(lengths.sum()) * 16 * 4
    assert lengths.unique().numel() > 1
    blocks = [
        block
        for table, count in zip(cache.block_table.view(-1, cache.block_table.shape[-1]), lengths.flatten(), strict=True)
        for block in table[: -(-int(count) // 16)].tolist()
    ]
    assert sorted(blocks) == list(range(len(cache.key_blocks)))


def test_contenders_that_disagree_are_not_timed() -> None:
    attention = next(case for case in all_cases(CONFIG) if case.question == "attention_kept")
    right = attention.run()
    wrong = [result + 1 for result in right]
    benchmark.check_agreement([attention, dataclasses.replace(attention, run=lambda: right)])
    with pytest.raises(AssertionError):
        benchmark.check_agreement([attention, dataclasses.replace(attention, run=lambda: wrong)])


def test_backends_agree_on_its_inputs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """What a run on a GPU does before it measures, with the kernels interpreted where there is none."""
    pytest.importorskip("triton")
    both = [kernels_for(device, "triton"), REFERENCE]
    monkeypatch.setattr(cases, "contenders", lambda config: both)
    found = list(all_cases(dataclasses.replace(CONFIG, device=device.type)))
    assert {case.question for case in found if case.contender == "triton"} == QUESTIONS - {"copy"}
    for question in QUESTIONS:
        benchmark.check_agreement([case for case in found if case.question == question])


def test_speed_is_bytes_over_the_median() -> None:
    case = Case(question="q", contender="c", run=list, nbytes=3_000_000, capturable=False)
    found = benchmark.figures(case, [1.0, 2.0, 9.0], copy_speed=3.0)
    assert found["gb_per_s"] == pytest.approx(1.5)
    assert found["of_copy"] == pytest.approx(0.5)
    assert found["p50_ms"] == 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        run_main(monkeypatch)
