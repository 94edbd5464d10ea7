"""CAKE against loops over the attention matrix."""

from __future__ import annotations

import math

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.cake import Cake
from prefill_worker.compression.policy import TokenBudget
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

TOKENS = 140
PROMPT = prompt_shape(TOKENS, range(3, 110))
LAYERS = [random_attention(PROMPT, seed, spread=0.3 + 0.9 * seed) for seed in range(3)]


def columns(layer: LayerAttention, window: int) -> list[list[list[float]]]:
    """[query head][key before the window][row of the window]."""
    weights = attention_matrix(layer)[:, -window:, : TOKENS - window]
    return weights.mT.tolist()


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def naive_preference(layer: LayerAttention, window: int, tau1: float, tau2: float) -> float:
    heads = columns(layer, window)
    entropy = -sum(value * math.log(value) for head in heads for key in head for value in key)
    return entropy ** (1 / tau1) * sum(variance(key) for head in heads for key in head) ** (1 / tau2)


def naive_kept(layer: LayerAttention, window: int, gamma: float, kernel: int, kept: int) -> list[list[int]]:
    heads, first = columns(layer, window), TOKENS - window
    chosen = []
    for kv_head in range(2):
        scores = [0.0] * first
        for head in heads[2 * kv_head : 2 * kv_head + 2]:
            plain = [sum(key) / window + gamma * variance(key) for key in head]
            for at in range(first):
                near = [plain[other] for other in range(at - kernel // 2, at + kernel // 2 + 1) if 0 <= other < first]
                scores[at] += sum(near) / kernel / 2
        best = sorted(range(first), key=lambda at: (-scores[at], at))[: kept - window]
        chosen.append(sorted([*best, *range(first, TOKENS)]))
    return chosen


@pytest.mark.parametrize(
    ("window", "gamma", "kernel", "taus"),
    [(24, 200.0, 5, (1.0, 1.0)), (12, 0.0, 1, (2.0, 2.0)), (16, 5.0, 7, (0.5, 2))],
)
def test_it_is_the_naive_method(window: int, gamma: float, kernel: int, taus: tuple[float, float]) -> None:
    policy = Cake(window=window, gamma=gamma, kernel=kernel, tau1=taus[0], tau2=taus[1])
    found = select_tokens(policy, [observe(policy, layer) for layer in LAYERS], Budget(max_kept_tokens=50))
    preferences = [naive_preference(layer, window, *taus) for layer in LAYERS]
    wanted = [window + 3 * (50 - window) * preference / sum(preferences) for preference in preferences]
    counts = [kept.num_kept(2, TOKENS)[0] for kept in found]
    assert sum(counts) == 150
    assert all(abs(count - share) < 1 for count, share in zip(counts, wanted, strict=True))
    assert counts[0] < counts[1] < counts[2]
    for layer, kept, count in zip(LAYERS, found, counts, strict=True):
        assert positions(kept) == naive_kept(layer, window, gamma, kernel, count)


def test_what_is_measured_of_the_rows() -> None:
    policy, layer = Cake(window=6), LAYERS[1]
    spread, heads = observe(policy, layer)[policy.needs(PROMPT)[0]], columns(layer, 6)
    entropy = -sum(value * math.log(value) for head in heads for key in head for value in key)
    assert spread.entropy.item() == pytest.approx(entropy, rel=1e-4)
    for kv_head, mean, varying in zip(range(2), spread.mean.tolist(), spread.variance.tolist(), strict=True):
        first, second = heads[2 * kv_head : 2 * kv_head + 2]
        assert mean == pytest.approx([sum(a + b) / 12 for a, b in zip(first, second, strict=True)], rel=1e-4)
        expected = [(variance(a) + variance(b)) / 2 for a, b in zip(first, second, strict=True)]
        assert varying == pytest.approx(expected, rel=1e-3)


def test_budgets_are_in_proportion_and_what_a_full_layer_cannot_take_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cake, "layer_shares", lambda *_: [0.9, 0.06, 0.04])
    layers = [observe(Cake(), layer) for layer in LAYERS]

    def kept(retention: float) -> list[int]:
        share = Budget(retention=retention).share_of(1000)
        return Cake().allocate(layers, TokenBudget(retention=share, num_tokens=1000, num_layers=3))

    # 32 each, and 3 * (132 - 32) by preference
    assert kept(0.132) == [302, 50, 44]
    # 1632 of 1000 tokens; the others grow alike: 32 + 106.7 and 32 + 71.1 by the same factor
    first, second, third = kept(0.6)
    assert (first, first + second + third) == (1000, 1800)
    assert second / third == pytest.approx((32 + 3 * 568 * 0.06) / (32 + 3 * 568 * 0.04), rel=0.01)


@pytest.mark.parametrize("tokens", [1, 20, 32])
def test_a_prompt_within_the_window_has_no_preference(tokens: int) -> None:
    layers = [observe(Cake(), random_attention(prompt_shape(tokens), seed)) for seed in range(2)]
    assert Cake().layer_shares(layers) == [0.5, 0.5]


def test_a_single_row_does_not_vary() -> None:
    policy = Cake(window=1)
    layer = observe(policy, LAYERS[0])
    spread = layer[policy.needs(PROMPT)[0]]
    assert not spread.variance.any()
    expected = attention_matrix(LAYERS[0])[:, -1, :-1].view(2, 2, -1).mean(dim=1)
    torch.testing.assert_close(spread.mean.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "parameters",
    [
        {"window": 0},
        {"kernel": 2},
        {"gamma": -1.0},
        {"gamma": math.inf},
        {"gamma": math.nan},
        {"tau1": 0.0},
        {"tau2": 11.0},
        {"tau2": math.nan},
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=f"cake: {next(iter(parameters))}"):
        Cake(**parameters)  # type: ignore[arg-type]
