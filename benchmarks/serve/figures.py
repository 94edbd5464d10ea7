"""What happened to each request, and the figures of many: definitions and keys of `vllm bench serve`.

TTFT: client send -> first token; TTST: -> second token; ITL: gaps between tokens; E2EL: client send -> last token;
TPOT: (E2EL - TTFT) / (n - 1). Goodput: requests per second that meet every objective.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vlcache import Completion

OK = "OK"
# A stream that ended well and said nothing cannot be timed; vLLM counts it as failed too.
NO_TOKENS = "NO_TOKENS"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request.

    Attributes:
        code: OK, or the name of the status code that it failed with.
        arrivals_s: Seconds from sending to each token of the answer; at least one when the code is OK.
    """

    code: str
    input_tokens: int = 0
    arrivals_s: tuple[float, ...] = ()
    kv_full_bytes: int = 0
    kv_kept_bytes: int = 0
    kv_sent_bytes: int = 0

    @classmethod
    def of(cls, completion: Completion) -> Outcome:
        """The outcome of a request that was answered."""
        timings, kept, sent = completion.timings, completion.compression, completion.transfer
        if timings.ttft_s is None:
            return cls(code=NO_TOKENS)
        return cls(
            code=OK,
            input_tokens=completion.usage.prompt_tokens,
            arrivals_s=tuple(itertools.accumulate(timings.itl_s, initial=timings.ttft_s)),
            kv_full_bytes=kept.full_bytes if kept else 0,
            kv_kept_bytes=kept.kept_bytes if kept else 0,
            kv_sent_bytes=sent.sent_bytes if sent else 0,
        )

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.arrivals_s[0]

    @property
    def e2el_s(self) -> float:
        """Seconds to the last token."""
        return self.arrivals_s[-1]

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first; 0 for an answer of one token, which then meets any objective."""
        return (self.e2el_s - self.ttft_s) / max(1, len(self.arrivals_s) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Seconds between neighbouring tokens; one fewer than tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals_s)]


LATENCIES: dict[str, Callable[[Outcome], float]] = {
    "ttft": lambda outcome: outcome.ttft_s,
    "tpot": lambda outcome: outcome.tpot_s,
    "e2el": lambda outcome: outcome.e2el_s,
}
"""What an objective may be set on: a request's latency in seconds, by its key."""


def parse_objectives(words: Sequence[str]) -> dict[str, float]:
    """Limits in seconds by latency, of words such as `ttft:500`, in ms.

    Raises:
        ValueError: A word is not one of ttft, tpot or e2el, a colon and a positive number, or a latency comes twice.
    """
    limits_s: dict[str, float] = {}
    for word in words:
        name, _, limit_ms = word.partition(":")
        if name not in LATENCIES or name in limits_s:
            raise ValueError(f"{word!r}: give each of {', '.join(LATENCIES)} at most once, as in ttft:500")
        limits_s[name] = _positive(limit_ms, word) / 1000
    return limits_s


def meets(outcome: Outcome, limits_s: Mapping[str, float]) -> bool:
    """Whether a request was answered within every limit."""
    return outcome.code == OK and all(LATENCIES[name](outcome) <= limit for name, limit in limits_s.items())


def figures(outcomes: Sequence[Outcome], *, duration_s: float, limits_s: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a load that took `duration_s`; times in ms, None where nothing was observed."""
    done = [outcome for outcome in outcomes if outcome.code == OK]
    longer = [outcome for outcome in done if len(outcome.arrivals_s) > 1]
    input_tokens = sum(outcome.input_tokens for outcome in done)
    output_tokens = sum(len(outcome.arrivals_s) for outcome in done)
    good = sum(meets(outcome, limits_s) for outcome in done)
    return {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "failed_by_code": dict(Counter(outcome.code for outcome in outcomes if outcome.code != OK)),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / duration_s,
        "request_goodput": good / duration_s if limits_s else None,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        **_statistics("ttft", [outcome.ttft_s for outcome in done]),
        **_statistics("ttst", [outcome.arrivals_s[1] for outcome in longer]),
        **_statistics("tpot", [outcome.tpot_s for outcome in longer]),
        **_statistics("itl", [gap for outcome in done for gap in outcome.itl_s]),
        **_statistics("e2el", [outcome.e2el_s for outcome in done]),
        **_kv_bytes(done),
    }


def _statistics(name: str, values_s: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and 99th percentile (linear interpolation) in ms."""
    keys = [f"{statistic}_{name}_ms" for statistic in ("mean", "median", "std", "p99")]
    if not values_s:
        return dict.fromkeys(keys)
    values_ms = np.array(values_s) * 1000
    figures_ms = (values_ms.mean(), np.median(values_ms), values_ms.std(), np.percentile(values_ms, 99))
    return dict(zip(keys, map(float, figures_ms), strict=True))


def _kv_bytes(done: Sequence[Outcome]) -> dict[str, int]:
    full, kept = sum(outcome.kv_full_bytes for outcome in done), sum(outcome.kv_kept_bytes for outcome in done)
    return {
        "kv_full_bytes": full,
        "kv_kept_bytes": kept,
        "kv_sent_bytes": sum(outcome.kv_sent_bytes for outcome in done),
        "kv_saved_bytes": full - kept,
    }


def _positive(text: str, word: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{word!r}: the limit must be a positive number of milliseconds")
    return value
