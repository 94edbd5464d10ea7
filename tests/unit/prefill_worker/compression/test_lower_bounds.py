"""What is certain before all layers have come stays true, whatever the layers to come are like."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prefill_worker.compression.budget import paper_budget, paper_lower_bounds, strict_budget, strict_lower_bounds
from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.pipeline import asked_retention, select_tokens, token_budget
from prefill_worker.compression.policies.prefix_kv import flattest
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.registry import build_policy
from prefill_worker.compression.statistics import ObservedLayer
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import observe, prompt_shape, random_attention
from tests.unit.prefill_worker.compression.test_cascade import MONOTONE, every_monotone

BUDGETS = {"strict": (strict_budget, strict_lower_bounds), "paper": (paper_budget, paper_lower_bounds)}
densities = st.one_of(st.floats(0.005, 1.0), st.sampled_from((0.01, 0.5, 1.0)))


def prompts() -> st.SearchStrategy[PromptShape]:
    """From one token on; images at the start, in the middle, at the end, or none."""

    def shape(tokens: int, first: int, visual: int) -> PromptShape:
        return prompt_shape(tokens, range(min(first, tokens), min(first + visual, tokens)))

    return st.builds(shape, st.integers(1, 150), st.integers(0, 40), st.integers(0, 150))


def passing(policy: Policy, prompt: PromptShape, spreads: list[float], seed: int) -> list[ObservedLayer]:
    """Layers whose attention is from flat (0) to sharp."""
    drawn = [random_attention(prompt, seed=seed + layer, spread=spread) for layer, spread in enumerate(spreads)]
    return [observe(policy, layer) for layer in drawn]


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(MONOTONE),
    prompt=prompts(),
    spreads=st.lists(st.sampled_from((0.0, 0.1, 1.0, 5.0, 30.0)), min_size=2, max_size=6),
    seed=st.integers(0, 1 << 16),
    retention=st.sampled_from((0.01, 0.05, 0.1, 0.25, 0.5, 0.9)),
    scope=st.sampled_from(BudgetScope),
)
def test_what_is_certain_is_kept(
    policy: Policy, prompt: PromptShape, spreads: list[float], seed: int, retention: float, scope: BudgetScope
) -> None:
    budget, layers = Budget(retention=retention, scope=scope), passing(policy, prompt, spreads, seed)
    assume(asked_retention(prompt, budget) < 1)
    cascade = Cascade(policy, prompt, budget, len(layers))
    final = select_tokens(policy, layers, budget)
    for layer in layers:
        cascade.add(layer)
        certain, bounds = cascade.certain(), cascade.bounds()
        assert len(certain) == len(bounds) == len(cascade.layers)
        for index, (fewest, most) in enumerate(zip(certain, bounds, strict=True)):
            chosen = final[index].chosen
            assert chosen is not None
            assert len(chosen) * fewest <= int(chosen.sum()) <= len(chosen) * most or _by_head(policy)
            if fewest:
                assert not bool((cascade.best(index, fewest) & ~chosen).any())


def _by_head(policy: Policy) -> bool:
    """Whether heads may share less than they are given; what is certain is compared token by token."""
    return type(policy).share_heads is not Policy.share_heads


@pytest.mark.parametrize("budget", BUDGETS)
@given(
    seen=st.lists(densities, min_size=1, max_size=20),
    unseen=st.lists(densities, max_size=20),
    tokens=st.integers(1, 3000),
    retention=st.sampled_from((0.004, 0.01, 0.05, 0.1, 0.29, 0.5, 0.999)),
    min_tokens=st.integers(1, 16),
)
def test_no_layer_to_come_takes_more_than_the_densest(
    budget: str, seen: list[float], unseen: list[float], tokens: int, retention: float, min_tokens: int
) -> None:
    allocate, bound = BUDGETS[budget]
    asked = TokenBudget(retention=Fraction(str(retention)), num_tokens=tokens, num_layers=len(seen) + len(unseen))
    final = allocate([*seen, *unseen], asked, min_tokens)
    fewest = bound(seen, asked, min_tokens)[: len(seen)]
    assert all(0 <= low <= kept for low, kept in zip(fewest, final, strict=False))


@every_monotone
def test_another_layer_never_lowers_a_bound(policy: Policy) -> None:
    prompt = prompt_shape(230, range(2, 180), seed=1)
    layers = passing(policy, prompt, [3.0, 0.5, 8.0, 1.0, 0.2, 5.0], seed=0)
    for budget in (Budget(retention=0.1), Budget(retention=0.5), Budget(retention=0.3, scope=BudgetScope.VISUAL)):
        tokens, before = token_budget(prompt, budget, len(layers)), [0] * len(layers)
        for seen in range(1, len(layers) + 1):
            bounds = policy.lower_bounds(layers[:seen], tokens)
            assert len(bounds) == seen
            assert all(now >= earlier for now, earlier in zip(bounds, before, strict=False))
            before = bounds
        assert all(0 <= kept - bound <= 2 for kept, bound in zip(policy.allocate(layers, tokens), before, strict=True))


def test_the_formula_of_vl_cache() -> None:
    """d_l of the whole budget, over the sum of the densities so far and 1 for each layer to come."""
    asked = TokenBudget(retention=Fraction(1, 10), num_tokens=1000, num_layers=32)
    share = int(3200 * 0.5 / (16 * 0.5 + 16))
    assert paper_lower_bounds([0.5] * 16, asked, 16)[:16] == [share] * 16 == [66] * 16
    assert strict_lower_bounds([0.5] * 16, asked, 16) == [share - 1] * 16
    assert strict_lower_bounds([1.0] * 31, asked, 16) == [99] * 31


@given(prompts(), st.integers(0, 1 << 16), st.sampled_from((0.0, 1.0, 30.0)), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_attention_is_flatter_than_flat(prompt: PromptShape, seed: int, spread: float, text_stays: bool) -> None:
    policy = build_policy("prefix_kv", {})
    (layer,) = passing(policy, prompt, [spread], seed)
    stays = ~prompt.visual if text_stays else torch.zeros_like(prompt.visual)
    assert bool((flattest(stays) <= policy._mass_before(layer, stays)).all())


def test_nothing_is_certain_where_no_token_is() -> None:
    prompt = prompt_shape(2000, range(2, 1900))
    layers = passing(VLCache(min_tokens=1), prompt, [30.0], seed=0)
    cascade = Cascade(VLCache(min_tokens=1), prompt, Budget(max_kept_tokens=2), 64)
    cascade.add(layers[0])
    assert cascade.certain()[0] in (0, 1)
