"""AdaKV against sorting the tokens of all heads together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.ada_kv import AdaKV
from prefill_worker.compression.policies.snap_kv import SnapKV
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

TOKENS, WINDOW = 130, 16
PROMPT = prompt_shape(TOKENS, range(3, 110))


def uneven_layer() -> LayerAttention:
    """Two KV heads: the first attends to few tokens, the second to all."""
    layer = random_attention(PROMPT, seed=5)
    layer.query[:2] *= 12
    layer.query[2:] *= 0.3
    return layer


def naive_scores(layer: LayerAttention) -> list[list[float]]:
    """Attention of the window on earlier tokens, mean of 5 neighbours, per KV head."""
    received = attention_matrix(layer)[:, -WINDOW:, : TOKENS - WINDOW].sum(dim=1).view(2, 2, -1).sum(dim=1).tolist()
    return [[sum(row[max(0, at - 2) : at + 3]) / 5 for at in range(len(row))] for row in received]


@pytest.mark.parametrize("kept", [20, 45, 100])
@pytest.mark.parametrize("floor_share", [0.0, 0.2, 0.7])
def test_heads_share_what_their_best_tokens_say(kept: int, floor_share: float) -> None:
    policy, layer = AdaKV(window=WINDOW, floor_share=floor_share), uneven_layer()
    (selection,) = select_tokens(policy, [observe(policy, layer)], Budget(max_kept_tokens=kept))
    scores, base = naive_scores(layer), kept - WINDOW
    together = sorted((-score, head, at) for head, row in enumerate(scores) for at, score in enumerate(row))[: 2 * base]
    counts = [sum(head == wanted for _, head, _ in together) for wanted in range(2)]
    exact = [WINDOW + (1 - floor_share) * count + floor_share * base for count in counts]
    found = selection.num_kept(2, TOKENS)
    assert sum(found) == 2 * kept
    assert all(abs(count - share) < 1 for count, share in zip(found, exact, strict=True))
    for head, (row, count) in enumerate(zip(scores, found, strict=True)):
        best = sorted(range(len(row)), key=lambda at: (-row[at], at))[: count - WINDOW]
        assert positions(selection)[head] == sorted([*best, *range(TOKENS - WINDOW, TOKENS)])


def test_heads_differ_and_a_floor_of_one_is_snap_kv() -> None:
    policy, snap = AdaKV(floor_share=1.0), SnapKV()
    layer = observe(policy, uneven_layer())
    (alike,) = select_tokens(policy, [layer], Budget(max_kept_tokens=60))
    (expected,) = select_tokens(snap, [layer], Budget(max_kept_tokens=60))
    assert positions(alike) == positions(expected)
    (uneven,) = select_tokens(AdaKV(), [layer], Budget(max_kept_tokens=100))
    few, many = uneven.num_kept(2, TOKENS)
    assert few + 10 < many


@given(
    scores=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4),
    kept=st.integers(1, 9),
    floor_share=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
)
def test_every_head_gets_some_and_none_more_than_there_is(
    scores: list[list[int]], kept: int, floor_share: float
) -> None:
    ranked = torch.tensor(scores).float()
    ranked[:, -1] = torch.inf
    shares = AdaKV(floor_share=floor_share).share_heads(ranked, kept)
    assert sum(shares) == kept * len(scores)
    assert all(1 <= share <= 9 for share in shares)


@pytest.mark.parametrize("parameters", [{"floor_share": -0.1}, {"floor_share": 1.1}, {"kernel": 2}])
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=f"ada_kv: {next(iter(parameters))}"):
        AdaKV(**parameters)  # type: ignore[arg-type]
