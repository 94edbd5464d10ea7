"""MixKV against loops over pairs of keys."""

from __future__ import annotations

import math

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import Selection, select_tokens, statistics_for
from prefill_worker.compression.policies.mix_kv import MixKV, mix
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.vl_cache import VLCache
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

PROMPT = prompt_shape(120, range(3, 100))
Vectors = list[list[float]]


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


def scaled(values: list[float], mean: float) -> list[float]:
    shares = [(value - min(values)) / (max(values) - min(values)) for value in values]
    return [share * mean * len(shares) / sum(shares) for share in shares]


def naive_mix(attention: list[float], keys: Vectors, values: Vectors) -> list[float]:
    """One KV head."""
    size, mean = len(keys), sum(attention) / len(attention)
    pairs = [[cosine(keys[i], keys[j]) for j in range(size)] for i in range(size)]
    r = sum(pairs[i][j] for i in range(size) for j in range(size) if i != j) / (size * (size - 1))
    norms = scaled([math.hypot(*value) for value in values], mean)
    diversity = scaled([-sum(row) / size for row in pairs], mean)
    return [(1 - r) * (a + n) + r * d for a, n, d in zip(attention, norms, diversity, strict=True)]


def sums_of(layer: LayerAttention, rows: range) -> Vectors:
    """Attention that each key receives, per KV head."""
    received = attention_matrix(layer)[:, rows.start : rows.stop].sum(dim=1)
    return received.view(2, layer.group, -1).sum(dim=1).tolist()


def aligned(spread: float = 0.7) -> LayerAttention:
    """Keys that share a direction, so that redundancy is neither 0 nor 1; the second head's more than the first's."""
    layer = random_attention(PROMPT, seed=9)
    layer.key[0, :, 0] += spread * 2
    layer.key[1, :, 0] += spread * 6
    return layer


def select(layer: LayerAttention, policy: Policy, kept: int) -> Selection:
    return select_tokens(policy, [observe(policy, layer)], Budget(max_kept_tokens=kept))[0]


def test_on_snap_kv_it_is_the_naive_method() -> None:
    layer = aligned()
    expected = []
    for head, sums in enumerate(sums_of(layer, range(88, 120))):
        near = [[sums[at] for at in range(at - 2, at + 3) if 0 <= at < 88] for at in range(88)]
        pooled = [sum(there) / 5 for there in near]
        scores = naive_mix(pooled, layer.key[head, :88].tolist(), layer.value[head, :88].tolist())
        best = sorted(range(88), key=lambda at: (-scores[at], at))[: 50 - 32]
        expected.append(sorted([*best, *range(88, 120)]))
    assert positions(select(layer, MixKV(), 50)) == expected
    assert expected != positions(select(layer, SnapKV(), 50))


def test_on_vl_cache_it_is_the_naive_method() -> None:
    layer, rows = aligned(), range(100, 120)
    expected = []
    for head, sums in enumerate(sums_of(layer, rows)):
        scores = naive_mix(sums, layer.key[head].tolist(), layer.value[head].tolist())
        best = sorted(range(115), key=lambda at: (-scores[at], at))[: 50 - 5]
        expected.append(sorted([*best, *range(115, 120)]))
    assert positions(select(layer, MixKV(base="vl_cache"), 50)) == expected
    assert expected != positions(select(layer, VLCache(shared_heads=False), 50))


@pytest.mark.parametrize(("base", "policy"), [("snap_kv", SnapKV()), ("vl_cache", VLCache())])
def test_statistics_and_layer_budgets_are_the_bases(base: str, policy: Policy) -> None:
    layers = [random_attention(PROMPT, seed=seed, spread=1.0 + 3 * seed) for seed in range(3)]
    kept = []
    for one in (MixKV(base=base), policy):
        selections = select_tokens(one, [observe(one, layer) for layer in layers], Budget(retention=0.4))
        kept.append([selection.num_kept(2, 120) for selection in selections])
    assert kept[0] == kept[1]
    assert statistics_for(MixKV(base=base), PROMPT) == statistics_for(policy, PROMPT)


def test_redundant_keys_are_spread_out() -> None:
    """Two directions: where almost all keys are alike, the one that differs is worth most, whoever is looked at."""
    key = torch.tensor([[[1.0, 0.0]] * 9 + [[0.0, 1.0]]])
    scores = mix(torch.linspace(1.0, 0.1, 10)[None], key, torch.ones(1, 10, 2))
    assert int(scores.argmax()) == 9


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_equal_keys_and_values_of_nothing_leave_no_score_undefined(tokens: int) -> None:
    for key in (torch.ones(2, tokens, 4), torch.zeros(2, tokens, 4)):
        assert mix(torch.rand(2, tokens), key, torch.zeros(2, tokens, 4)).isfinite().all()


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="base"):
        MixKV(base="streaming_llm")
