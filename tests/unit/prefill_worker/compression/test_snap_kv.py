"""SnapKV and StreamingLLM against loops over the attention matrix."""

from __future__ import annotations

import pytest

from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.streaming_llm import StreamingLLM
from prefill_worker.compression.policy import Policy
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

PROMPT = prompt_shape(150, range(3, 120))


def naive_snap_kv(attention: list[list[list[float]]], window: int, kernel: int, kept: int, pooling: str) -> list[int]:
    """One KV head; attention is [group, tokens, tokens]."""
    tokens = len(attention[0])
    first = tokens - window
    sums = [sum(head[row][key] for head in attention for row in range(first, tokens)) for key in range(first)]
    pooled = []
    for at in range(first):
        near = [sums[other] if 0 <= other < first else None for other in range(at - kernel // 2, at + kernel // 2 + 1)]
        there = [value for value in near if value is not None]
        pooled.append(max(there) if pooling == "max" else sum(there) / kernel)
    best = sorted(range(first), key=lambda at: (-pooled[at], at))[: kept - window]
    return sorted([*best, *range(first, tokens)])


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize(("window", "kernel"), [(32, 5), (16, 7), (8, 1)])
def test_snap_kv_is_the_naive_method(window: int, kernel: int, pooling: str) -> None:
    attention = attention_matrix(random_attention(PROMPT, seed=4)).view(2, 2, 150, 150).tolist()
    expected = [naive_snap_kv(head, window, kernel, 45, pooling) for head in attention]
    assert select(SnapKV(window=window, kernel=kernel, pooling=pooling), kept=45) == expected


def select(policy: Policy, kept: int) -> list[list[int]]:
    layer = observe(policy, random_attention(PROMPT, seed=4))
    (selection,) = select_tokens(policy, [layer], Budget(max_kept_tokens=kept))
    return positions(selection)


def test_a_window_larger_than_the_budget_keeps_its_latest_tokens() -> None:
    assert select(SnapKV(window=64), kept=20) == [[*range(130, 150)]] * 2


@pytest.mark.parametrize("sinks", [0, 4])
def test_streaming_llm_keeps_both_ends(sinks: int) -> None:
    assert select(StreamingLLM(sinks=sinks), kept=20) == [[*range(sinks), *range(150 - 20 + sinks, 150)]] * 2


@pytest.mark.parametrize(
    "parameters", [{"window": 0}, {"window": 257}, {"kernel": 4}, {"kernel": 65}, {"pooling": "sum"}]
)
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        SnapKV(**parameters)  # type: ignore[arg-type]
