"""What a second question costs with and without a retained prefix."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from benchmarks.second_question.prefix import Prefix
from benchmarks.second_question.text_pass import TextEngine
from benchmarks.stopwatch import elapsed_ms
from prefill_worker.compression.pipeline import statistics_for
from prefill_worker.compression.registry import DEFAULT_POLICY, build_policy
from prefill_worker.engine.engine import Prefilled
from prefill_worker.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The two ways to a pass that can be compressed for a second question, in one pair.

    Attributes:
        images: Images of the prompt.
        prompt_tokens: Its tokens.
        text_tokens: Those behind the prefix.
        whole_ms: The whole prompt's pass, the default policy's statistics included.
        vision_ms: The vision tower's part of it.
        text_ms: The text's pass over the retained prefix, with the same statistics.
        prefix_kv_bytes: Retained keys and values.
        prefix_query_bytes: Retained queries; some policies need none.
    """

    images: int
    prompt_tokens: int
    text_tokens: int
    whole_ms: float
    vision_ms: float
    text_ms: float
    prefix_kv_bytes: int
    prefix_query_bytes: int


def cost_of(engine: TextEngine, prompt: Prompt, prefix: Prefix) -> Cost:
    """Times both ways once, one after the other."""
    statistics = statistics_for(build_policy(DEFAULT_POLICY, {}), prompt.shape)
    passes = list[Prefilled]()
    whole_ms = elapsed_ms(lambda: passes.append(engine.prefill(prompt, statistics, threading.Event())), engine.device)
    text_ms = elapsed_ms(lambda: engine.prefill_text(prompt, prefix, statistics), engine.device)
    return Cost(
        images=len(prompt.pixels),
        prompt_tokens=prompt.shape.num_tokens,
        text_tokens=prompt.shape.num_tokens - prefix.num_tokens,
        whole_ms=whole_ms,
        vision_ms=1000 * passes[0].seconds["vision_encode"],
        text_ms=text_ms,
        prefix_kv_bytes=prefix.kv_bytes,
        prefix_query_bytes=prefix.query_bytes,
    )


def cost_rows(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """One per number of images: medians of times and their ratio, means of sizes."""
    by_images: dict[int, list[Cost]] = defaultdict(list)
    for cost in costs:
        by_images[cost.images].append(cost)
    return [{"images": images, **_row(by_images[images])} for images in sorted(by_images)]


def _row(costs: Sequence[Cost]) -> dict[str, Any]:
    whole, text = median(each.whole_ms for each in costs), median(each.text_ms for each in costs)
    return {
        "pairs": len(costs),
        "prompt_tokens_mean": fmean(each.prompt_tokens for each in costs),
        "text_tokens_mean": fmean(each.text_tokens for each in costs),
        "whole_ms": whole,
        "vision_ms": median(each.vision_ms for each in costs),
        "text_ms": text,
        "ratio": whole / text,
        "prefix_kv_bytes_mean": fmean(each.prefix_kv_bytes for each in costs),
        "prefix_query_bytes_mean": fmean(each.prefix_query_bytes for each in costs),
    }
