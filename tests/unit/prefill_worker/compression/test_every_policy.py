"""What holds for every policy, whatever its method."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from fractions import Fraction

import pytest
import torch

from prefill_worker.compression.pipeline import Selection, select_tokens
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.compression.statistics import ObservedLayer
from shared.request.params import MIN_KEPT_TOKENS, Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape, random_attention

LAYERS, HEADS = 3, 2
PROMPTS = {
    "image first": prompt_shape(230, range(2, 180), seed=1),
    "image last": prompt_shape(200, range(40, 200), seed=2),
    "two images": prompt_shape(300, [*range(5, 100), *range(120, 270)], seed=3),
    "text": prompt_shape(190, seed=4),
    "short": prompt_shape(20, range(1, 15), seed=5),
    "one token": prompt_shape(1),
}
every_policy = pytest.mark.parametrize("policy", [build_policy(name, {}) for name in POLICIES], ids=[*POLICIES])
every_prompt = pytest.mark.parametrize("kind", PROMPTS)


def layers_of(policy: Policy, kind: str, dtype: torch.dtype = torch.float32) -> list[ObservedLayer]:
    layers = []
    for index in range(LAYERS):
        layer = random_attention(PROMPTS[kind], seed=index, num_kv_heads=HEADS, spread=1.0 + 2 * index)
        tensors = {name: getattr(layer, name).to(dtype) for name in ("query", "key", "value")}
        layers.append(observe(policy, dataclasses.replace(layer, **tensors)))
    return layers


def kept_tokens(selections: list[Selection], kind: str) -> list[int]:
    return [count for chosen in selections for count in chosen.num_kept(HEADS, PROMPTS[kind].num_tokens)]


@every_policy
@every_prompt
@pytest.mark.parametrize("retention", ["0.01", "0.1", "0.37", "0.9"])
def test_the_budget_is_honoured(policy: Policy, kind: str, retention: str) -> None:
    num_tokens = PROMPTS[kind].num_tokens
    kept = kept_tokens(select_tokens(policy, layers_of(policy, kind), Budget(retention=float(retention))), kind)
    assert len(kept) == LAYERS * HEADS
    assert all(1 <= count <= num_tokens for count in kept)
    floor = LAYERS * min(num_tokens, MIN_KEPT_TOKENS)
    assert sum(kept) <= HEADS * max(int(Fraction(retention) * LAYERS * num_tokens), floor)


@every_policy
@every_prompt
@pytest.mark.parametrize("retention", [0.05, 0.5])
def test_a_visual_budget_keeps_all_text(policy: Policy, kind: str, retention: float) -> None:
    prompt = PROMPTS[kind]
    if prompt.num_visual == 0:
        pytest.skip("without a visual token such a budget keeps everything")
    budget = Budget(retention=retention, scope=BudgetScope.VISUAL)
    selections = select_tokens(policy, layers_of(policy, kind), budget)
    for selection in selections:
        assert selection.chosen is not None
        assert selection.chosen[:, ~prompt.visual].all()
    text = prompt.num_tokens - prompt.num_visual
    visual = max(int(Fraction(str(retention)) * LAYERS * prompt.num_visual), LAYERS * min(prompt.num_visual, 16))
    assert sum(kept_tokens(selections, kind)) <= HEADS * (LAYERS * text + visual)


@every_policy
@every_prompt
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_prompts_get_equal_selections(policy: Policy, kind: str, dtype: torch.dtype) -> None:
    budget = Budget(max_kept_tokens=33)
    first, second = (select_tokens(policy, layers_of(policy, kind, dtype), budget) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert positions(one) == positions(other)
        assert 0 < one.attention_mass <= 1
        assert (one.merged is None) == (other.merged is None)
        if one.merged is not None and other.merged is not None:
            assert all(torch.equal(a, b) for a, b in zip(one.merged, other.merged, strict=True))


@every_policy
@every_prompt
def test_merged_rows_fit_the_parcel(policy: Policy, kind: str) -> None:
    layers = layers_of(policy, kind, torch.bfloat16)
    for layer, selection in zip(layers, select_tokens(policy, layers, Budget(retention=0.2)), strict=True):
        for merged, whole in zip(selection.merged or (), (layer.key, layer.value), strict=False):
            rows = sum(selection.num_kept(HEADS, PROMPTS[kind].num_tokens))
            assert merged.shape == (rows, whole.shape[2])
            assert merged.dtype == whole.dtype
            assert merged.isfinite().all()


@every_policy
def test_it_says_where_it_comes_from_and_what_its_parameters_mean(policy: Policy) -> None:
    module = sys.modules[type(policy).__module__]
    assert module.__doc__ is not None
    assert len(module.__doc__.strip().splitlines()) >= 5
    for field in dataclasses.fields(policy):  # type: ignore[arg-type]  # every policy is a dataclass
        owner = next(kind for kind in type(policy).__mro__ if field.name in inspect.get_annotations(kind))
        after = inspect.getsource(owner).split(f"\n    {field.name}: ", 1)[1].splitlines()[1]
        assert after.strip().startswith('"""'), f"{field.name} has no description"
