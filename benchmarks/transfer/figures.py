"""From samples to figures: percentiles by size and method, the ratios of their medians, and the goals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.transfer.methods import METHODS, Sample

# Speed over speed.
RATIOS = {
    "memory_over_memcpy": ("memory", "memcpy"),
    "memory_installed_over_memcpy": ("memory_installed", "memcpy"),
    "grpc_over_memcpy": ("grpc", "memcpy"),
    "grpc_installed_over_memcpy": ("grpc_installed", "memcpy"),
    "grpc_over_bare_grpc": ("grpc", "bare_grpc"),
    "bare_grpc_over_memcpy": ("bare_grpc", "memcpy"),
    "tcp_over_memcpy": ("tcp", "memcpy"),
}
AT_LEAST = {"memory_over_memcpy": 0.9, "grpc_over_memcpy": 0.22, "grpc_over_bare_grpc": 0.95}
IN_PLACE_MS = 1.0
LATENESS_P99_MS = 5.0


def transfer_figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """Tables by size, the ratios of the middle size once more, and the time of a hand-over by size."""
    sizes = {f"{nbytes / 1e6:.0f} MB": _size(nbytes, samples) for nbytes in sorted({each.nbytes for each in samples})}
    judged = list(sizes)[len(sizes) // 2]
    return {
        "judged_size": judged,
        **sizes[judged]["ratios"],
        "in_place_ms": {name: size["methods"]["memory_in_place"]["wall_ms"]["p50"] for name, size in sizes.items()},
        "sizes": sizes,
    }


def lateness_figures(lateness_s: Sequence[float]) -> dict[str, float]:
    """Percentiles of how late tokens were, in ms, and how many there were."""
    cuts = statistics.quantiles(lateness_s, n=100, method="inclusive")
    percentiles = {f"p{cut}": cuts[cut - 1] * 1e3 for cut in (50, 90, 99)}
    return {**percentiles, "max": max(lateness_s) * 1e3, "tokens": len(lateness_s)}


def goals(figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was wanted, what was measured, and whether that is enough."""
    judged = {
        name: {"goal": f">= {least}", "measured": figures[name], "met": figures[name] >= least}
        for name, least in AT_LEAST.items()
    }
    in_place, late = max(figures["in_place_ms"].values()), figures["token_lateness_ms"]["grpc"]["p99"]
    judged["in_place_ms"] = {"goal": f"<= {IN_PLACE_MS}", "measured": in_place, "met": in_place <= IN_PLACE_MS}
    judged["token_lateness_p99_ms"] = {"goal": f"< {LATENESS_P99_MS}", "measured": late, "met": late < LATENESS_P99_MS}
    return judged


def _size(nbytes: int, samples: Sequence[Sample]) -> dict[str, Any]:
    methods = {
        method: _method([each for each in samples if (each.method, each.nbytes) == (method, nbytes)])
        for method in METHODS
    }
    median = {method: figures["wall_ms"]["p50"] for method, figures in methods.items()}
    ratios = {name: median[rival] / median[ours] for name, (ours, rival) in RATIOS.items()}
    return {"bytes": nbytes, "ratios": ratios, "methods": methods}


def _method(samples: Sequence[Sample]) -> dict[str, Any]:
    wall = [each.wall_s for each in samples]
    cuts = statistics.quantiles(wall, n=20, method="inclusive")
    return {
        "wall_ms": {"best": min(wall) * 1e3, "p5": cuts[0] * 1e3, "p50": cuts[9] * 1e3, "p95": cuts[18] * 1e3},
        "mb_per_s": samples[0].nbytes / statistics.median(wall) / 1e6,
        "sender_cpu_ms": statistics.median(each.sender_cpu_s for each in samples) * 1e3,
        "receiver_cpu_ms": statistics.median(each.receiver_cpu_s for each in samples) * 1e3,
    }
