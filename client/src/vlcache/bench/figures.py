"""The figures of a load: keys and definitions of `vllm bench serve`, and what became of the KV.

TTFT: sending to the first token. E2EL: sending to the last one. TPOT: (E2EL - TTFT) / (tokens - 1). ITL: gaps between
tokens. Times are in milliseconds, rates per second.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlcache._completion import Completion
from vlcache._errors import VlcacheError
from vlcache.bench.load import Run

METRICS = ("ttft", "tpot", "itl", "e2el")
# What an objective may limit; vLLM's, too.
OBJECTIVES = ("ttft", "tpot", "e2el")


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks in proportion; 0 of nothing."""
    if not values:
        return 0.0
    ordered, place = sorted(values), (len(values) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def result_of(run: Run, *, percentiles: Sequence[float], objectives: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a run.

    percentiles: of the four times, in percent.
    objectives: milliseconds by `OBJECTIVES`; requests within all of them are `request_goodput`, None without any.
    """
    answers = [outcome.answer for outcome in run.outcomes]
    completed = [answer for answer in answers if isinstance(answer, Completion) and _is_timed(answer)]
    prompt_tokens = sum(answer.usage.prompt_tokens for answer in completed)
    tokens, seconds = sum(answer.usage.generated_tokens for answer in completed), run.duration_s
    times = [_times_ms(answer) for answer in completed]
    good = sum(all(each[name] <= limit for name, limit in objectives.items()) for each in times)
    return {
        "duration": seconds,
        "completed": len(completed),
        "failed": len(answers) - len(completed),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": tokens,
        "request_throughput": len(completed) / seconds,
        "request_goodput": good / seconds if objectives else None,
        "output_throughput": tokens / seconds,
        "total_token_throughput": (prompt_tokens + tokens) / seconds,
        "max_concurrent_requests": _most_at_once(run),
        **_spread(completed, times, percentiles),
        **_kv(completed),
        "errors": dict(Counter(_error_name(answer) for answer in answers if not _is_timed(answer))),
    }


def _is_timed(answer: Completion | VlcacheError) -> bool:
    """An answer without tokens has no times; vLLM counts it as failed, too."""
    return isinstance(answer, Completion) and answer.timings.ttft_s is not None


def _error_name(answer: Completion | VlcacheError) -> str:
    return answer.reason or answer.code.name if isinstance(answer, VlcacheError) else "NO_TOKENS"


def _times_ms(answer: Completion) -> dict[str, float]:
    """Of one answer. One of a single token has no time per further token, which meets any objective."""
    timings, further = answer.timings, answer.usage.generated_tokens - 1
    assert timings.ttft_s is not None
    tpot_s = (timings.e2e_s - timings.ttft_s) / further if further > 0 else 0.0
    return {"ttft": 1000 * timings.ttft_s, "tpot": 1000 * tpot_s, "e2el": 1000 * timings.e2e_s}


def _spread(
    completed: Sequence[Completion], times: Sequence[Mapping[str, float]], percentiles: Sequence[float]
) -> dict[str, float]:
    values = {
        "ttft": [each["ttft"] for each in times],
        "tpot": [
            each["tpot"] for each, answer in zip(times, completed, strict=True) if answer.usage.generated_tokens > 1
        ],
        "itl": [1000 * gap_s for answer in completed for gap_s in answer.timings.itl_s],
        "e2el": [each["e2el"] for each in times],
    }
    result = {}
    for name in METRICS:
        many = values[name] or [0.0]
        result[f"mean_{name}_ms"] = statistics.fmean(many)
        result[f"median_{name}_ms"] = statistics.median(many)
        result[f"std_{name}_ms"] = statistics.pstdev(many)
        for percent in percentiles:
            result[f"p{percent:g}_{name}_ms"] = percentile(many, percent)
    return result


def _most_at_once(run: Run) -> int:
    changes = [(outcome.sent_s, 1) for outcome in run.outcomes] + [(outcome.ended_s, -1) for outcome in run.outcomes]
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0)


def _kv(completed: Sequence[Completion]) -> dict[str, float]:
    """Bytes of KV of all prompts: full, kept, sent; and the share that was kept."""
    kept = [answer.compression for answer in completed if answer.compression is not None]
    full_bytes, kept_bytes = sum(each.full_bytes for each in kept), sum(each.kept_bytes for each in kept)
    return {
        "kv_full_bytes": full_bytes,
        "kv_kept_bytes": kept_bytes,
        "kv_sent_bytes": sum(answer.transfer.sent_bytes for answer in completed if answer.transfer is not None),
        "kv_saved_bytes": full_bytes - kept_bytes,
        "kv_retention": kept_bytes / full_bytes if full_bytes else 0.0,
    }
