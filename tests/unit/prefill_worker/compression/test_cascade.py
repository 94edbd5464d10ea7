"""Layers that lose tokens while others come end with the sets of a selection that had all of them."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch

from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.pipeline import select_tokens, token_budget
from prefill_worker.compression.policies.cake import Cake
from prefill_worker.compression.policies.mix_kv import MixKV
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.compression.statistics import ObservedLayer
from prefill_worker.engine.prompt_cache import WORTHWHILE, PromptCache
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import observe, prompt_shape, random_attention

LAYERS, HEADS = 6, 2
PROMPTS = {
    "image first": prompt_shape(230, range(2, 180), seed=1),
    "image last": prompt_shape(120, range(20, 120), seed=2),
    "text": prompt_shape(90, seed=4),
    "short": prompt_shape(20, range(1, 15), seed=5),
    "one token": prompt_shape(1),
}
MONOTONE = [build_policy(name, {}) for name, kind in POLICIES.items() if kind.monotone]
MONOTONE += [VLCache(budget="paper"), VLCache(budget="uniform"), VLCache(shared_heads=False), MixKV(base="vl_cache")]
every_monotone = pytest.mark.parametrize("policy", MONOTONE, ids=lambda policy: repr(policy)[:60])


def layers_of(policy: Policy, kind: str) -> list[ObservedLayer]:
    spreads = (3.0, 0.5, 8.0, 1.0, 0.2, 5.0)
    drawn = [random_attention(PROMPTS[kind], seed=seed, spread=spread) for seed, spread in enumerate(spreads)]
    return [observe(policy, layer) for layer in drawn]


def cascaded(policy: Policy, layers: list[ObservedLayer], budget: Budget) -> tuple[Cascade, PromptCache]:
    cascade = Cascade(policy, layers[0].prompt, budget, len(layers))
    cache = PromptCache(cascade)
    for index, layer in enumerate(layers):
        key, value = cache.update(layer.key[None], layer.value[None], index)
        cache.passed(dataclasses.replace(layer, key=key[0], value=value[0]))
        cache.check_integrity()
    return cascade, cache


def budgets(kind: str) -> list[Budget]:
    found = [Budget(retention=share) for share in (0.02, 0.1, 0.37, 0.9)]
    if PROMPTS[kind].num_visual:
        found += [Budget(retention=share, scope=BudgetScope.VISUAL) for share in (0.1, 0.5)]
    return found


@every_monotone
@pytest.mark.parametrize("kind", PROMPTS)
def test_the_sets_are_those_of_one_shot(policy: Policy, kind: str) -> None:
    layers = layers_of(policy, kind)
    for budget in budgets(kind):
        cascade, cache = cascaded(policy, layers, budget)
        wanted = select_tokens(policy, layers, budget)
        found = select_tokens(policy, cascade.layers, budget)
        for layer, held, one, other in zip(layers, cache.held, wanted, found, strict=True):
            assert one.chosen is not None
            assert other.chosen is not None
            assert torch.equal(one.chosen, other.chosen)
            assert one.attention_mass == other.attention_mass
            assert one.merged is None
            assert not bool((other.chosen & ~held).any())
            assert held.shape == layer.key.shape[:2]


@every_monotone
@pytest.mark.parametrize("kind", PROMPTS)
def test_rows_are_those_of_the_tokens_held(policy: Policy, kind: str) -> None:
    layers = layers_of(policy, kind)
    _, cache = cascaded(policy, layers, Budget(retention=0.1))
    for layer, held, key, value in zip(layers, cache.held, cache.keys, cache.values, strict=True):
        assert torch.equal(key.reshape(-1, key.shape[-1]), layer.key[held])
        assert torch.equal(value.reshape(-1, value.shape[-1]), layer.value[held])


@every_monotone
def test_another_layer_never_raises_a_bound(policy: Policy) -> None:
    layers, prompt = layers_of(policy, "image first"), PROMPTS["image first"]
    for budget in budgets("image first"):
        tokens = token_budget(prompt, budget, LAYERS)
        before = [tokens.num_tokens] * LAYERS
        for seen in range(1, LAYERS + 1):
            bounds = policy.upper_bounds(layers[:seen], tokens)
            assert len(bounds) == seen
            assert all(now <= earlier for now, earlier in zip(bounds, before, strict=False))
            before = bounds
        assert all(kept <= bound for kept, bound in zip(policy.allocate(layers, tokens), before, strict=True))


@every_monotone
@pytest.mark.parametrize("retention", [0.05, 0.2])
def test_the_peak_is_the_budget_and_one_layer(policy: Policy, retention: float) -> None:
    layers = layers_of(policy, "image first")
    _, cache = cascaded(policy, layers, Budget(retention=retention))
    layer_bytes = layers[0].key.nbytes + layers[0].value.nbytes
    num_tokens = PROMPTS["image first"].num_tokens
    # with what is not worth cutting, a token of rounding per layer, and half of a layer twice while it is cut
    share = max(retention, 16 / num_tokens) / WORTHWHILE + 1 / num_tokens
    assert cache.peak_bytes <= (LAYERS * share + 1 + min(1.0, LAYERS * share) / 2) * layer_bytes
    assert cache.peak_bytes < 0.75 * LAYERS * layer_bytes


def test_without_a_cascade_all_is_kept() -> None:
    layers, cache = layers_of(VLCache(), "text"), PromptCache()
    for index, layer in enumerate(layers):
        cache.update(layer.key[None], layer.value[None], index)
    cache.check_integrity()
    assert cache.held == []
    assert cache.peak_bytes == sum(layer.key.nbytes + layer.value.nbytes for layer in layers)
    assert all(torch.equal(key, layer.key) for key, layer in zip(cache.keys, layers, strict=True))


def test_a_view_of_something_larger_is_not_kept() -> None:
    cache, whole = PromptCache(), torch.randn(1, 10, 3 * HEADS, 8)
    key, value = cache.update(*whole.transpose(1, 2)[:, : 2 * HEADS].chunk(2, dim=1), 0)
    assert torch.equal(key, whole[:, :, :HEADS].transpose(1, 2))
    assert torch.equal(value, whole[:, :, HEADS : 2 * HEADS].transpose(1, 2))
    assert key.untyped_storage().nbytes() == key.nbytes


def test_scored_layers_hold_no_kv() -> None:
    cascade, _ = cascaded(VLCache(), layers_of(VLCache(), "text"), Budget(retention=0.2))
    for layer in cascade.layers:
        assert layer.key.shape == (HEADS, 90, 0)
        assert layer.key.untyped_storage().nbytes() == layer.value.untyped_storage().nbytes() == 0


def test_budgets_that_may_yet_grow_do_not_cascade() -> None:
    with pytest.raises(AssertionError, match="may yet grow"):
        Cascade(Cake(), PROMPTS["text"], Budget(retention=0.2), LAYERS)


def test_whoever_merges_is_not_monotone() -> None:
    merging = {name for name, kind in POLICIES.items() if kind.merge is not Policy.merge}
    passes = {name for name in POLICIES if build_policy(name, {}).needs_own_pass or build_policy(name, {}).look_ahead}
    assert merging
    assert passes
    assert not {name for name in merging | passes if POLICIES[name].monotone}


def test_a_budget_of_the_first_layers_never_exceeds_the_prompt() -> None:
    policy, layers = build_policy("prefix_kv", {}), layers_of(build_policy("prefix_kv", {}), "text")
    budget = TokenBudget(retention=Fraction(9, 10), num_tokens=90, num_layers=LAYERS)
    assert policy.upper_bounds(layers[:1], budget) == [90]
