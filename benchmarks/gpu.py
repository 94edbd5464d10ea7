"""Everything that is measured on a GPU, one command: tests, kernels, decode steps, prefills, capacity, generations.

Each measurement is a process of its own and ends with one JSON file in the output folder. What has its file is skipped,
so the command can be stopped and run again; one that fails is reported, and the others go on.

    python -m benchmarks.gpu --out build/bench-gpu
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.report import environment, table
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parents[1]
NO_DEVICE = "there is no CUDA device to measure; --device cpu only tries every command with a tiny model"
# What pytest returns when nothing was selected.
NO_TESTS = 5
# One that hangs must not take the time of all.
LONGEST_S = 240.0
# Sequences and prompt tokens: VL-Cache's own.
WORKLOADS = ((1, 131072), (4, 32768), (64, 2000))
TINY = ("--hidden", "256", "--layers", "2", "--kv-heads", "1", "--vocabulary", "64")
HEADLINES = {
    "decode_step": ("ours_kept_ms", "hf_ratio", "ratio", "roofline_ratio"),
    "end_to_end": ("ours_s", "hf_s", "speed_up"),
    "capacity": ("sequences_ratio", "throughput_ratio", "roofline_throughput_ratio"),
    "kernels": ("copy_gb_per_s",),
    "prefill_overhead": ("plain_ms", "statistics_overhead", "selection_overhead", "parcel_overhead"),
    "tests": ("summary",),
}


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """What to run, and for how long."""

    out: Path = Path("build/bench-gpu")
    """Folder of the results."""
    minutes: float = 10.0
    """No measurement goes on for longer than that; run again to do the rest."""
    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` only tries every command with a tiny model."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One process.

    Attributes:
        name: Of its result, unique.
        module: What `python -m` runs.
        arguments: Without those that say where the result goes.
    """

    name: str
    module: str
    arguments: tuple[str, ...]


Run = Callable[[Measurement, Path, float], None]


def measurements(device: str) -> Iterator[Measurement]:
    """All of them, the most wanted first; on a CPU the same ones, as small as they can be."""
    yield Measurement(name="tests_gpu", module="pytest", arguments=("-m", "gpu"))
    if device == "cuda":
        # without a GPU these run interpreted, which the test suite does anyway
        yield Measurement(name="tests_kernels", module="pytest", arguments=("tests/kernels",))
        yield from _on_gpu()
    else:
        yield from _rehearsal()


def _on_gpu() -> Iterator[Measurement]:
    mistral = ("--device", "cuda", "--shape", "llava-1.6-mistral-7b")
    yield Measurement(name="kernels", module="benchmarks.kernels", arguments=())
    for batch, prompt in WORKLOADS:
        for shape in SHAPES:
            sizes = ("--batch", str(batch), "--prompt", str(prompt))
            yield Measurement(
                name=f"decode_step_{shape}_{batch}x{prompt}",
                module="benchmarks.decode_step",
                arguments=("--device", "cuda", "--shape", shape, *sizes),
            )
    generation = ("--batch", "64", "--prompt", "2000", "--new-tokens", "100")
    yield Measurement(name="end_to_end", module="benchmarks.end_to_end", arguments=(*mistral, *generation))
    prefill = ("--prompt", "8192")
    yield Measurement(name="prefill_overhead", module="benchmarks.prefill_overhead", arguments=(*mistral, *prefill))
    memory = ("--kv-memory-mib", "32768", "--prompt", "2000", "--churn", "100")
    yield Measurement(
        name="capacity",
        module="benchmarks.capacity",
        arguments=("--device", "cuda", "--shape", "llava-1.5-7b", *memory),
    )


def _rehearsal() -> Iterator[Measurement]:
    small = ("--layers", "2", "--prompt", "40", "--rows", "8", "--copy-mib", "1", "--rounds", "2", "--batch", "2")
    yield Measurement(name="kernels", module="benchmarks.kernels", arguments=("--device", "cpu", *small))
    steps = ("--batch", "2", "--prompt", "50", "--rounds", "2")
    yield Measurement(name="decode_step", module="benchmarks.decode_step", arguments=(*TINY, *steps))
    generation = ("--batch", "2", "--prompt", "90", "--rows", "10", "--new-tokens", "4", "--rounds", "2")
    yield Measurement(name="end_to_end", module="benchmarks.end_to_end", arguments=(*TINY, *generation))
    prefill = ("--prompt", "60", "--rows", "10", "--rounds", "2")
    yield Measurement(name="prefill_overhead", module="benchmarks.prefill_overhead", arguments=(*TINY, *prefill))
    memory = ("--kv-memory-mib", "1", "--prompt", "100", "--new-tokens", "6", "--churn", "4")
    yield Measurement(name="capacity", module="benchmarks.capacity", arguments=(*TINY, *memory))


def run_all(config: GpuConfig, run: Run) -> list[str]:
    """Does what has no result yet; names what has none afterwards."""
    config.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * config.minutes
    wanted = list(measurements(config.device))
    for number, measurement in enumerate(wanted, start=1):
        result = config.out / f"{measurement.name}.json"
        left = deadline - time.monotonic()
        if not result.exists() and left > 0:
            sys.stdout.write(f"[{number}/{len(wanted)}] {measurement.name}\n")
            sys.stdout.flush()
            _attempt(measurement, result, min(left, LONGEST_S), run)
    return [each.name for each in wanted if not (config.out / f"{each.name}.json").exists()]


def _attempt(measurement: Measurement, result: Path, limit_s: float, run: Run) -> None:
    """The result appears whole or not at all."""
    part, started = result.with_suffix(".part"), time.monotonic()
    try:
        run(measurement, part, limit_s)
    except subprocess.SubprocessError as error:
        log = result.with_suffix(".log")
        sys.stdout.write(f"    no result after {time.monotonic() - started:.0f} s ({error}); see {log}\n")
    else:
        part.replace(result)
        sys.stdout.write(f"    {time.monotonic() - started:.0f} s\n")


def run_process(measurement: Measurement, result: Path, limit_s: float) -> None:
    """Runs one; its output goes to a log beside the result.

    Raises:
        subprocess.SubprocessError: It failed or took too long.
    """
    is_test = measurement.module == "pytest"
    target = () if is_test else ("--json", str(result.resolve()))
    command = [sys.executable, "-m", measurement.module, *measurement.arguments, *target]
    log = result.with_suffix(".log")
    with log.open("w") as output:
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=limit_s)
    if done.returncode and not (is_test and done.returncode == NO_TESTS):
        raise subprocess.CalledProcessError(done.returncode, measurement.module)
    if is_test:
        summary = log.read_text().splitlines()[-1]
        result.write_text(json.dumps({"benchmark": "tests", "summary": summary, "environment": environment()}) + "\n")


def headlines(config: GpuConfig) -> str:
    """The figures to look at first, of all results so far."""
    rows = []
    for measurement in measurements(config.device):
        result = config.out / f"{measurement.name}.json"
        if result.exists():
            figures = json.loads(result.read_text())
            rows.append([measurement.name, ", ".join(_shown(figures, HEADLINES[figures["benchmark"]]))])
    return table(["measurement", "figures"], rows)


def _shown(figures: dict[str, Any], keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        value = figures[key]
        yield f"{key} {value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Runs, prints what came out; fails when something is missing."""
    config = tyro.cli(GpuConfig, description=__doc__)
    if config.device == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    missing = run_all(config, run_process)
    sys.stdout.write(f"\n{headlines(config)}\n")
    if missing:
        sys.exit(f"no result yet: {', '.join(missing)}; run the command again to go on")


if __name__ == "__main__":
    main()
