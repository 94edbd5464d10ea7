"""The one command for a GPU: it resumes, outlives failures, and what it calls exists and fits."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from benchmarks import capacity, decode_step, end_to_end, gpu, prefill_overhead
from benchmarks.gpu import GpuConfig, Measurement, headlines, measurements, run_all, run_process
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels.config import KernelsConfig
from benchmarks.picture import picture
from benchmarks.random_kv import even, pool_bytes
from benchmarks.random_llama import ModelConfig, build_model, weight_bytes
from benchmarks.report import environment

MODULES: dict[str, tuple[Any, Any]] = {
    "benchmarks.kernels": (kernels, KernelsConfig),
    "benchmarks.decode_step": (decode_step, decode_step.DecodeStepConfig),
    "benchmarks.end_to_end": (end_to_end, end_to_end.EndToEndConfig),
    "benchmarks.prefill_overhead": (prefill_overhead, prefill_overhead.PrefillOverheadConfig),
    "benchmarks.capacity": (capacity, capacity.CapacityConfig),
}
DEVICE_BYTES = 139 << 30
TESTS = [measurement for measurement in measurements("cuda") if measurement.module == "pytest"]
BENCHMARKS = [measurement for measurement in measurements("cuda") if measurement.module != "pytest"]
REHEARSALS = [measurement for measurement in measurements("cpu") if measurement.module != "pytest"]


def parsed(measurement: Measurement) -> Any:
    return tyro.cli(MODULES[measurement.module][1], args=measurement.arguments)


@pytest.mark.parametrize("measurement", BENCHMARKS, ids=lambda measurement: measurement.name)
def test_every_command_is_understood_and_runs_on_the_gpu(measurement: Measurement) -> None:
    assert parsed(measurement).device == "cuda"


def test_names_are_unique_and_every_module_is_rehearsed() -> None:
    names = [measurement.name for measurement in (*TESTS, *BENCHMARKS)]
    assert len(set(names)) == len(names)
    assert {each.module for each in BENCHMARKS} == {each.module for each in REHEARSALS} == set(MODULES)
    assert {parsed(measurement).device for measurement in REHEARSALS} == {"cpu"}


@pytest.mark.parametrize("measurement", BENCHMARKS, ids=lambda measurement: measurement.name)
def test_it_fits_on_the_device(measurement: Measurement) -> None:
    config = parsed(measurement)
    if not isinstance(config, ModelConfig):
        return
    weights = weight_bytes(build_model(dataclasses.replace(config, device="meta"), positions=10))
    if isinstance(config, capacity.CapacityConfig):
        kv = 2 * config.kv_memory_mib << 20
    else:
        full, growth = even(config.layout, [config.prompt] * config.layout.num_layers), 200
        kv = pool_bytes(config, full, growth, getattr(config, "batch", 1))
    embedding = 2 * config.text.vocabulary * config.text.hidden
    # activations of a prefill of the whole batch, or one layer's KV while a dynamic cache grows
    room = 20 << 30
    assert weights + embedding + kv + room < DEVICE_BYTES


@pytest.mark.parametrize("measurement", REHEARSALS, ids=lambda measurement: measurement.name)
def test_every_benchmark_leaves_a_result_with_its_headlines_and_a_picture(
    measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process; what `run_process` does is start `python -m` with the same arguments."""
    result = tmp_path / f"{measurement.name}.json"
    monkeypatch.setattr(sys, "argv", [measurement.module, *measurement.arguments, "--json", str(result)])
    MODULES[measurement.module][0].main()
    assert f"| {measurement.name} | " in headlines(GpuConfig(out=tmp_path, device="cpu"))
    assert picture(json.loads(result.read_text())).startswith("<svg")


class FakeRun:
    """Leaves a result, or fails for the names in `broken`."""

    def __init__(self, *broken: str) -> None:
        self.broken = broken
        self.seen: list[str] = []

    def __call__(self, measurement: Measurement, result: Path, limit_s: float) -> None:
        self.seen.append(measurement.name)
        result.write_text("{")
        if measurement.name in self.broken:
            raise subprocess.CalledProcessError(1, measurement.module)
        result.write_text(json.dumps({"benchmark": "tests", "summary": f"{limit_s > 0}", "environment": {}}))


def test_a_failure_stops_nothing_and_only_it_is_repeated(tmp_path: Path, capsys: Any) -> None:
    config, names = GpuConfig(out=tmp_path / "new"), [each.name for each in measurements("cuda")]
    first, second, third = FakeRun("kernels"), FakeRun(), FakeRun()
    assert run_all(config, first) == ["kernels"]
    assert first.seen == names
    assert "kernels.log" in capsys.readouterr().out
    assert run_all(config, second) == []
    assert second.seen == ["kernels"]
    assert run_all(config, third) == []
    assert third.seen == []
    assert headlines(config).count("True") == len(names)


def test_nothing_starts_after_its_time(tmp_path: Path) -> None:
    run = FakeRun()
    missing = run_all(GpuConfig(out=tmp_path, minutes=0.0), run)
    assert run.seen == []
    assert missing == [each.name for each in measurements("cuda")]


def pytest_of(tmp_path: Path, source: str) -> Measurement:
    test = tmp_path / "test_it.py"
    test.write_text(source)
    return Measurement(name="tests", module="pytest", arguments=("-m", "gpu", "-p", "no:cacheprovider", str(test)))


def test_processes_end_with_a_result(tmp_path: Path) -> None:
    result = tmp_path / "tests.json"
    run_process(pytest_of(tmp_path, "def test_it():\n    pass\n"), result, 100.0)
    assert "1 deselected" in json.loads(result.read_text())["summary"]
    run_process(pytest_of(tmp_path, "import pytest\n@pytest.mark.gpu\ndef test_it():\n    pass\n"), result, 100.0)
    found = json.loads(result.read_text())
    assert "1 " in found["summary"]
    assert found["environment"]["cores"] == environment()["cores"]


def test_a_failed_process_is_an_error_and_leaves_its_output(tmp_path: Path) -> None:
    result = tmp_path / "capacity.part"
    wrong = Measurement(name="capacity", module="benchmarks.capacity", arguments=("--no-such-flag",))
    with pytest.raises(subprocess.CalledProcessError):
        run_process(wrong, result, 100.0)
    assert not result.exists()
    assert "no-such-flag" in (tmp_path / "capacity.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()
    assert not (tmp_path / "new").exists()
