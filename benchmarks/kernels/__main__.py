"""How fast the kernels are: beside the naive ones, beside PyTorch's, and beside a copy on the same device.

A copy reads and writes as fast as the memory allows, so it is the bound of every kernel that only moves KV. In each
round every contender runs once, interleaved; before that, the contenders of a question must agree.

    python -m benchmarks.kernels --batch 16 --prompt 2000 --retention 0.1 --json -
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import tyro
from tqdm import tqdm

from benchmarks.kernels.cases import COPY, Case, all_cases
from benchmarks.kernels.config import KernelsConfig
from benchmarks.kernels.timing import stopwatch
from benchmarks.report import table, write_json

# Of values around 1 in the least precise dtype.
AGREEMENT = 3e-2
NO_DEVICE = "there is no CUDA device to measure; --device cpu only tries the benchmark itself"


@torch.inference_mode()
def measure(config: KernelsConfig) -> dict[str, Any]:
    """Figures per question and contender: ms, and for memory-bound ones GB/s and their share of the copy's."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = list(all_cases(config))
    for question in {case.question for case in cases}:
        check_agreement([case for case in cases if case.question == question])
    watches = [stopwatch(case, config.torch_device) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    for _ in tqdm(range(config.rounds), unit="round", file=sys.stderr):
        for watch, taken in zip(watches, times, strict=True):
            taken.append(watch())
    copy_speed = next(speed(case, taken) for case, taken in zip(cases, times, strict=True) if case.question == COPY)
    questions: dict[str, dict[str, Any]] = defaultdict(dict)
    for case, taken in zip(cases, times, strict=True):
        questions[case.question][case.contender] = figures(case, taken, copy_speed)
    return {**machine(config), "copy_gb_per_s": copy_speed, "questions": dict(questions)}


def check_agreement(cases: Sequence[Case]) -> None:
    """No figures of wrong results.

    Raises:
        AssertionError: Two contenders computed different things.
    """
    results = [result for case in cases if (result := case.run())]
    for other in results[1:]:
        torch.testing.assert_close(list(other), list(results[0]), atol=AGREEMENT, rtol=AGREEMENT)


def speed(case: Case, times_ms: Sequence[float]) -> float | None:
    """GB/s at the median."""
    return None if case.nbytes is None else case.nbytes / statistics.median(times_ms) / 1e6


def figures(case: Case, times_ms: Sequence[float], copy_speed: float | None) -> dict[str, float]:
    """What is reported of one contender."""
    cuts = statistics.quantiles(times_ms, n=20, method="inclusive")
    found = {"p5_ms": cuts[0], "p50_ms": cuts[9], "p95_ms": cuts[18]}
    own_speed = speed(case, times_ms)
    if own_speed is not None and copy_speed is not None:
        found |= {"gb_per_s": own_speed, "of_copy": own_speed / copy_speed}
    return found


def machine(config: KernelsConfig) -> dict[str, Any]:
    """The device; everything else stands in the report's environment."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    if config.device == "cpu":
        return {"device": "cpu", "triton": triton}
    return {"device": torch.cuda.get_device_name(config.torch_device), "cuda": torch.version.cuda, "triton": triton}


def rows(questions: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """The table's lines; each contender beside the question's first."""
    for question, contenders in questions.items():
        first = next(iter(contenders.values()))
        for contender, found in contenders.items():
            bandwidth = [f"{found['gb_per_s']:.0f}", f"{found['of_copy']:.0%}"] if "of_copy" in found else ["", ""]
            times = [f"{found['p50_ms']:.3f}", f"{found['p95_ms']:.3f}", f"{found['p50_ms'] / first['p50_ms']:.2f}"]
            yield [question, contender, *times, *bandwidth]


def main() -> None:
    """Measures, prints a table, writes JSON."""
    config = tyro.cli(KernelsConfig, description=__doc__)
    if config.device == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    found = measure(config)
    header = ["question", "contender", "p50 ms", "p95 ms", "of the first", "GB/s", "of the copy"]
    sys.stdout.write(table(header, list(rows(found["questions"]))) + "\n")
    workload = {name: value for name, value in dataclasses.asdict(config).items() if name != "json"}
    write_json(config.json, {"benchmark": "kernels", "workload": workload, **found})


if __name__ == "__main__":
    main()
