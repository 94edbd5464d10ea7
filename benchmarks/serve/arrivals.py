"""When the requests of an open loop are sent."""

from __future__ import annotations

import math

import numpy as np


def arrival_offsets_s(*, count: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds from the start to each of `count` requests, as `vllm bench serve` draws them.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / `rate`: 1 is a Poisson process, less is burstier,
    more is steadier. All are stretched so that the last request is sent at exactly `count` / `rate`: few requests
    would otherwise offer quite another rate than the one asked for. An infinite rate sends everything at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    offsets = np.cumsum(rng.gamma(shape=burstiness, size=count))
    return (offsets * (count / rate / offsets[-1])).tolist()
