"""Sampling against a brute-force implementation; a step's random number is a function of (seed, position) alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from shared.model.sampler import sample, uniform
from shared.request.sampling import Sampling

MASK = 2**64 - 1
GOLDEN = [0.011546754286331562, 0.5023796042735054, 0.3035680343067586, 0.23190574451996193, 0.8837444827274451]


def philox(seed: int, counter: int) -> int:
    """First output word of Philox4x64-10 as published (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter & MASK, counter >> 64, 0, 0
    k0, k1 = seed, 0
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (right >> 64) ^ c1 ^ k0, right & MASK, (left >> 64) ^ c3 ^ k1, left & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c0


def brute_force(logits: list[float], sampling: Sampling, position: int) -> int:
    """Temperature, then top-k, then the smallest set that reaches top-p; the draw inverts its distribution."""
    if sampling.temperature == 0:
        return min(token for token, logit in enumerate(logits) if logit == max(logits))
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    ranked = ranked[: sampling.top_k or None]
    weights = [np.exp((logits[token] - max(logits)) / sampling.temperature) for token in ranked]
    total, kept, mass = sum(weights), [], 0.0
    for token, weight in zip(ranked, weights, strict=True):
        kept.append((token, weight / total))
        mass += weight / total
        if mass >= sampling.top_p:
            break
    threshold, reached = uniform(sampling.seed, position) * mass, 0.0
    for token, share in kept:
        reached += share
        if reached > threshold:
            return token
    return kept[-1][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_equal_maxima(dtype: torch.dtype) -> None:
    greedy = Sampling(max_new_tokens=1)
    assert sample(torch.tensor([1.0, 3.0, 2.0, 3.0, 3.0], dtype=dtype), greedy, 0) == 1
    assert sample(torch.zeros(1000, dtype=dtype), greedy, 5) == 0


def test_the_generator_is_published_philox() -> None:
    draw = random.Random(0)
    cases = [(0, 0), (MASK, MASK), (0, MASK), (MASK, 0)]
    cases += [(draw.getrandbits(64), draw.getrandbits(64)) for _ in range(50)]
    for seed, position in cases:
        assert uniform(seed, position) == (philox(seed, position + 1) >> 11) * 2.0**-53


def test_known_numbers_never_change() -> None:
    """A stream must be continued by another version of the service: these values are part of the protocol."""
    assert [uniform(seed, position) for seed, position in ((0, 0), (0, 1), (1, 0), (7, 1000), (MASK, MASK))] == GOLDEN


def test_random_numbers_are_spread_over_the_unit_interval() -> None:
    drawn = [uniform(seed, position) for seed in range(20) for position in range(500)]
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-square with 19 degrees of freedom, p < 0.001
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= number < 1 for number in drawn)


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"top_k": 5, "top_p": 0.7, "temperature": 1.7},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_every_draw_is_that_of_the_brute_force(values: dict[str, float]) -> None:
    draw = random.Random(1)
    for position in range(150):
        # rounded, so that there are ties
        logits = [round(draw.gauss(0, 2), draw.choice([0, 1, 6])) for _ in range(draw.randint(1, 30))]
        sampling = Sampling(**{"max_new_tokens": 1, "temperature": 1.0, "seed": draw.getrandbits(64), **values})
        expected = brute_force(logits, sampling, position)
        assert sample(torch.tensor(logits, dtype=torch.float64), sampling, position) == expected


LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5, 0.5, -3.0, 1.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion(temperature: float) -> None:
    sampling, draws = Sampling(max_new_tokens=1, temperature=temperature, seed=11), 4000
    counts = np.bincount([sample(LOGITS, sampling, at) for at in range(draws)], minlength=len(LOGITS))
    expected = torch.softmax(LOGITS.double() / temperature, 0).numpy() * draws
    assert ((counts - expected) ** 2 / expected).sum() < 26  # 7 degrees of freedom, p < 0.001


def test_cut_off_tokens_are_never_drawn_and_the_rest_is_renormalised() -> None:
    sampling, draws = Sampling(max_new_tokens=1, temperature=1.0, top_k=3, seed=5), 3000
    counts = np.bincount([sample(LOGITS, sampling, at) for at in range(draws)], minlength=len(LOGITS))
    kept = [2, 4, 1]  # of the equal logits 1 and 7 the lower token
    assert counts.sum() == counts[kept].sum()
    expected = torch.softmax(LOGITS[kept].double(), 0).numpy() * draws
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 14  # 2 degrees of freedom, p < 0.001


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_the_smallest_set_that_reaches_top_p_is_kept(top_p: float, kept: int) -> None:
    """Four equal tokens of exactly 1/4 each: reaching the share is enough."""
    sampling = Sampling(max_new_tokens=1, temperature=1.0, top_p=top_p)
    assert {sample(torch.zeros(4), sampling, at) for at in range(100)} == set(range(kept))


def test_a_draw_depends_on_seed_and_position_and_nothing_else() -> None:
    sampling = Sampling(max_new_tokens=1, temperature=1.0, seed=3)
    forward = [sample(LOGITS, sampling, at) for at in range(100)]
    torch.manual_seed(0)
    np.random.default_rng(0).random()
    backward = [sample(LOGITS, sampling, at) for at in reversed(range(100))]
    assert forward == backward[::-1]
    other = Sampling(max_new_tokens=1, temperature=1.0, seed=4)
    assert [sample(LOGITS, other, at) for at in range(100)] != forward


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    sampling = Sampling(max_new_tokens=1, temperature=temperature)
    for at in range(20):
        assert sample(torch.tensor([1.0, 5.0, 7.0, 6.0]), sampling, at) == 2


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((10,), -torch.inf)
    logits[[2, 6]] = 1.0
    sampling = Sampling(max_new_tokens=1, temperature=3.0)
    assert {sample(logits, sampling, at) for at in range(100)} == {2, 6}


def test_the_caller_keeps_its_logits() -> None:
    logits = LOGITS.clone()
    sample(logits, Sampling(max_new_tokens=1, temperature=0.7, top_k=2, top_p=0.5), 0)
    assert torch.equal(logits, LOGITS)
