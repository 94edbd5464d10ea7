"""Times steps: interleaved where all of them fit in memory together, one variant after another where they do not."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

WARM_UPS = 2

Step = Callable[[], object]


def elapsed_ms(step: Step, device: torch.device) -> float:
    """Wall-clock time of one call, with everything that it started on the device."""
    _synchronize(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    return (time.perf_counter() - started) * 1000


def interleaved_ms(steps: Mapping[str, Step], *, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """In each round every step runs once, so that a noisy machine disturbs all alike."""
    for step in steps.values():
        for _ in range(WARM_UPS):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), unit="round", file=sys.stderr, desc=", ".join(steps)):
        for name, step in steps.items():
            times[name].append(elapsed_ms(step, device))
    return times


def apart_ms(
    builders: Mapping[str, Callable[[], Step]], *, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Each variant is built, timed and freed before the next one: for variants that would not fit beside each other."""
    times: dict[str, list[float]] = {}
    for name, build in builders.items():
        times |= interleaved_ms({name: build()}, rounds=rounds, device=device)
        release_memory()
    return times


def release_memory() -> None:
    """Gives the device the memory back of what nobody refers to any more; captured graphs lie in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """5th, 50th and 95th; at least two values."""
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p5": cuts[0], "p50": cuts[9], "p95": cuts[18]}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
