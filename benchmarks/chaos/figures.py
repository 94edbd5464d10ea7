"""What was lost, and how long answers stood still."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.chaos.load import Stream

FAILOVERS = re.compile(r"^vlcache_failovers_total\{(?P<labels>.*)\} (?P<value>\S+)$", re.MULTILINE)
BUCKETS = re.compile(r"^vlcache_failover_seconds_bucket\{(?P<labels>.*)\} (?P<count>\S+)$", re.MULTILINE)
BOUND = re.compile(r'\ble="([^"]+)"')


def compared(streams: Sequence[Stream], twins: Sequence[Stream]) -> dict[str, Any]:
    """Each stream beside its undisturbed twin."""
    completed = [(stream, twin) for stream, twin in zip(streams, twins, strict=True) if not stream.failure]
    return {
        "requests": len(streams),
        "completed": len(completed),
        "lost": len(streams) - len(completed),
        "changed_streams": sum(not stream.same_as(twin) for stream, twin in completed),
        "duplicated_tokens": sum(max(0, len(stream.token_ids) - len(twin.token_ids)) for stream, twin in completed),
        "failures": sorted({stream.failure for stream in streams if stream.failure}),
    }


def longest_pause_ms(streams: Sequence[Stream], deaths_s: Sequence[float]) -> float:
    """The longest gap between two tokens of one stream in which a worker died."""
    gaps = itertools.chain.from_iterable(itertools.pairwise(stream.arrivals_s) for stream in streams)
    pauses = (after - before for before, after in gaps if _any_within(deaths_s, before, after))
    return 1000 * max(pauses, default=0.0)


def failovers(metrics: str, kind: str) -> int:
    """How often answers went on elsewhere in one way, from the text of the router's metrics."""
    return sum(
        int(float(found["value"])) for found in FAILOVERS.finditer(metrics) if f'kind="{kind}"' in found["labels"]
    )


def recovery_ms(metrics: str, share: float, *, answer: str) -> float | None:
    """A quantile of the time from a noticed loss to the next token, interpolated within the buckets of the router's
    histogram; None when nothing was lost.

    Args:
        answer: Of which answers: `BEGUN` or `NOT_BEGUN`.
    """
    buckets = [
        (float(BOUND.findall(found["labels"])[0]), float(found["count"]))
        for found in BUCKETS.finditer(metrics)
        if f'answer="{answer}"' in found["labels"]
    ]
    rank = share * buckets[-1][1] if buckets else 0.0
    if rank == 0:
        return None
    below_s, below_count = 0.0, 0.0
    for bound_s, count in buckets:
        if count >= rank:
            if math.isinf(bound_s):
                return 1000 * below_s
            return 1000 * (below_s + (bound_s - below_s) * (rank - below_count) / (count - below_count))
        below_s, below_count = bound_s, count
    raise AssertionError("the last bucket holds all")


def _any_within(moments_s: Sequence[float], begin_s: float, end_s: float) -> bool:
    place = bisect.bisect_left(moments_s, begin_s)
    return place < len(moments_s) and moments_s[place] <= end_s
