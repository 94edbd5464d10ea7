"""FastV's budget and ranking against loops; the pass itself is tested with the engine."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prefill_worker.compression.pipeline import select_tokens, sparse_prefill_for
from prefill_worker.compression.policies.fast_v import FastV
from prefill_worker.compression.policy import TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.sparse.fast_v import FastVPrefill
from prefill_worker.compression.statistics import ObservedLayer
from shared.errors import InvalidRequestError
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

PROMPT = prompt_shape(100, range(10, 70))
LAYERS = 4


def naive_order(last_row: list[float], prompt: PromptShape) -> list[int]:
    """The last token, text, image tokens; each by the attention of the last row."""
    last = prompt.num_tokens - 1
    visual = prompt.visual.tolist()
    return sorted(range(last + 1), key=lambda at: (at != last, visual[at], -last_row[at], at))


def observed(prompt: PromptShape, seed: int) -> tuple[ObservedLayer, list[int]]:
    """A layer, and its tokens from the best to the worst."""
    layer = random_attention(prompt, seed=seed)
    return observe(FastV(), layer), naive_order(attention_matrix(layer)[:, -1].mean(dim=0).tolist(), prompt)


@pytest.mark.parametrize("retention", [0.02, 0.2, 0.45, 0.9])
@pytest.mark.parametrize("prompt", [PROMPT, prompt_shape(100, range(40, 100)), prompt_shape(100)])
def test_each_layer_keeps_its_best_by_the_last_row(prompt: PromptShape, retention: float) -> None:
    layers, orders = zip(*(observed(prompt, seed) for seed in range(LAYERS)), strict=True)
    selections = select_tokens(FastV(), layers, Budget(retention=retention))
    for selection, order in zip(selections, orders, strict=True):
        first, second = positions(selection)
        assert first == second == sorted(order[: len(first)])


def counts(retention: str, policy: FastV | None = None) -> list[int]:
    layers = [observed(PROMPT, seed)[0] for seed in range(LAYERS)]
    budget = TokenBudget(retention=Fraction(retention), num_tokens=100, num_layers=LAYERS)
    return (policy or FastV()).allocate(layers, budget)


def survivors(retention: str, policy: FastV | None = None, scope: BudgetScope = BudgetScope.CACHE) -> int | None:
    sparse = sparse_prefill_for(policy or FastV(), PROMPT, Budget(retention=float(retention), scope=scope), LAYERS)
    assert sparse is None or isinstance(sparse, FastVPrefill)
    return None if sparse is None else sparse.kept


def test_deep_layers_share_what_the_first_leave() -> None:
    assert (counts("0.8"), survivors("0.8")) == ([100, 100, 60, 60], 60)
    assert (counts("0.71"), survivors("0.71")) == ([100, 100, 42, 42], 42)
    assert (counts("0.8", FastV(layer=1)), survivors("0.8", FastV(layer=1))) == ([100, 73, 73, 73], 73)


def test_without_an_image_token_in_deep_layers_the_first_are_cut() -> None:
    assert (counts("0.7"), survivors("0.7")) == ([100, 100, 40, 40], 40)
    assert (counts("0.69"), survivors("0.69")) == ([69] * 4, 69)


def test_text_alone_may_exceed_the_budget() -> None:
    assert (counts("0.3"), survivors("0.3")) == ([30] * 4, 40)
    assert (counts("0.01"), survivors("0.01")) == ([16] * 4, 40)


def test_the_share_of_the_paper_is_an_upper_limit() -> None:
    half = FastV(image_share=0.5)
    assert (counts("0.95", half), survivors("0.95", half)) == ([100, 100, 70, 70], 70)
    assert (counts("0.8", half), survivors("0.8", half)) == ([100, 100, 60, 60], 60)
    quarter = FastV(image_share=0.25)
    assert (counts("0.6", quarter), survivors("0.6", quarter)) == ([55] * 4, 55)
    assert survivors("0.8", FastV(image_share=0.0)) == 40


def test_a_budget_of_the_image_leaves_the_text_alone() -> None:
    """60 image tokens: 4 x 60 x 0.6 = 144 = 2 x 60 + 2 x 12."""
    assert survivors("0.6", scope=BudgetScope.VISUAL) == 40 + 12
    assert survivors("0.3", scope=BudgetScope.VISUAL) == 40 + 18


@given(
    first=st.integers(0, 30),
    images=st.integers(0, 60),
    last=st.integers(0, 30),
    layers=st.integers(1, 6),
    layer=st.integers(1, 7),
    retention=st.integers(1, 99),
    share=st.sampled_from([0.0, 0.25, 1.0]),
    scope=st.sampled_from(BudgetScope),
)
def test_what_is_kept_is_what_survives(
    first: int, images: int, last: int, layers: int, layer: int, retention: int, share: float, scope: BudgetScope
) -> None:
    prompt = prompt_shape(first + images + last + 1, range(first, first + images))
    policy, budget = FastV(layer=layer, image_share=share), Budget(retention=retention / 100, scope=scope)
    assume(images or scope is BudgetScope.CACHE)
    sparse = sparse_prefill_for(policy, prompt, budget, layers)
    seen = [observe(policy, random_attention(prompt, seed)) for seed in range(layers)]
    kept = [len(positions(chosen)[0]) for chosen in select_tokens(policy, seen, budget)]
    scored = images if scope is BudgetScope.VISUAL else prompt.num_tokens
    beside = prompt.num_tokens - scored
    assert sum(kept) <= layers * beside + max(layers * scored * retention // 100, layers * min(scored, 16))
    if sparse is not None:
        assert max(kept[layer:]) <= sparse.kept < prompt.num_tokens
        assert sparse.kept >= prompt.num_tokens - images
    elif layer < layers:
        assert images == 0 or kept[layer:] == [prompt.num_tokens] * (layers - layer)


@pytest.mark.parametrize(
    "parameters",
    [{"layer": 0}, {"layer": 1025}, {"image_share": -0.1}, {"image_share": 1.5}, {"image_share": float("nan")}],
)
def test_bad_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        FastV(**parameters)  # type: ignore[arg-type]
