"""Times calls on a device: a GPU's own clock, launches replayed from a CUDA graph as the engine does."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.kernels.cases import Case

WARM_UPS = 3


def stopwatch(case: Case, device: torch.device) -> Callable[[], float]:
    """A function that runs the case once and returns ms; compiles and warms up before it returns."""
    if device.type == "cpu":
        return lambda: _host_ms(case.run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            case.run()
    torch.cuda.current_stream().wait_stream(stream)
    return _device_watch(_captured(case.run) if case.capturable else case.run)


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _device_watch(run: Callable[[], object]) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def watch() -> float:
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return watch


def _host_ms(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1000
