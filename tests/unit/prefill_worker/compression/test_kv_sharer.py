"""KVSharer's choice against loops over the attention matrix; the pass itself is tested with the engine."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.eviction import eviction_for
from prefill_worker.compression.pipeline import Selection, select_tokens, sparse_prefill_for
from prefill_worker.compression.policies.kv_sharer import KVSharer
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.registry import build_policy
from prefill_worker.compression.statistics import ObservedLayer
from shared.errors import InvalidRequestError
from shared.kv.eviction import SharedLayers
from shared.request.params import MIN_KEPT_TOKENS, Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)
from tests.unit.prefill_worker.sharing import sharer, sharing

LAYERS, HEADS = 8, 2
PAIRS = ((6, 1), (4, 2), (5, 2), (3, 0), (7, 1))
PROMPT = prompt_shape(150, range(5, 120), seed=1)
PROMPTS = {
    "image first": PROMPT,
    "image last": prompt_shape(120, range(40, 120), seed=2),
    "text": prompt_shape(90, seed=4),
    "short": prompt_shape(20, range(1, 15), seed=5),
    "one token": prompt_shape(1),
}


def lenders_of(policy: Policy, prompt: PromptShape, budget: Budget) -> dict[int, int]:
    """As a pass would have them."""
    sparse = sparse_prefill_for(policy, prompt, budget, LAYERS)
    assert sparse is not None
    return {layer: lender for layer in range(LAYERS) if (lender := sparse.lender(layer)) is not None}


def observed(policy: Policy, prompt: PromptShape, budget: Budget) -> list[ObservedLayer]:
    """As a pass hands it over: a layer that borrows attends with its own queries to its lender's keys."""
    lenders = lenders_of(policy, prompt, budget)
    attention = [random_attention(prompt, seed=layer, num_kv_heads=HEADS) for layer in range(LAYERS)]
    read = [attention[lenders.get(layer, layer)] for layer in range(LAYERS)]
    seen = [dataclasses.replace(own, key=of.key, value=of.value) for own, of in zip(attention, read, strict=True)]
    return [dataclasses.replace(observe(policy, layer), lender=lenders.get(index)) for index, layer in enumerate(seen)]


def choose(policy: Policy, prompt: PromptShape, budget: Budget) -> list[Selection]:
    return select_tokens(policy, observed(policy, prompt, budget), budget)


def counts(selections: list[Selection], prompt: PromptShape) -> list[int]:
    return [count for chosen in selections for count in chosen.num_kept(HEADS, prompt.num_tokens)]


@pytest.mark.parametrize(
    ("retention", "borrowing"), [(0.99, 1), (0.9, 1), (0.875, 1), (0.8, 2), (0.5, 4), (0.375, 5), (0.3, 5), (0.05, 5)]
)
def test_as_many_layers_share_as_the_retention_asks_for(retention: float, borrowing: int) -> None:
    assert lenders_of(sharer(*PAIRS), PROMPT, Budget(retention=retention)) == dict(PAIRS[:borrowing])


def test_so_many_layers_share_as_were_asked_for() -> None:
    assert lenders_of(sharer(*PAIRS, layers=2), PROMPT, Budget(retention=0.1)) == dict(PAIRS[:2])


@pytest.mark.parametrize("retention", [0.9, 0.75, 0.5, 0.375])
def test_where_sharing_is_enough_every_token_stays(retention: float) -> None:
    selections = choose(sharer(*PAIRS), PROMPT, Budget(retention=retention))
    lenders = dict(PAIRS[: math.ceil((1 - retention) * LAYERS)])
    for layer, selection in enumerate(selections):
        kept = 0 if layer in lenders else PROMPT.num_tokens
        assert selection.num_kept(HEADS, PROMPT.num_tokens) == [kept] * HEADS
        assert selection.attention_mass == pytest.approx(1)


def naive_window_sums(layer: torch.Tensor, head: int, tokens: int) -> list[float]:
    """SnapKV on [query heads, tokens, tokens], window 32, mean of 5 neighbours with zeros beyond the ends."""
    group, window = len(layer) // HEADS, min(32, tokens)
    rows = layer[head * group : (head + 1) * group, tokens - window :]
    earlier = [rows[:, :, at].sum().item() for at in range(tokens - window)]
    padded = [0.0, 0.0, *earlier, 0.0, 0.0]
    return [sum(padded[at : at + 5]) / 5 for at in range(len(earlier))]


@pytest.mark.parametrize("retention", [0.1, 0.25])
def test_the_other_layers_choose_tokens_of_the_whole_budget(retention: float) -> None:
    """By loops: what each layer that is left keeps, and what those that borrow are left with."""
    policy, tokens = sharer(*PAIRS, base="snap_kv"), PROMPT.num_tokens
    layers = observed(policy, PROMPT, Budget(retention=retention))
    selections = select_tokens(policy, layers, Budget(retention=retention))
    kept = int(Fraction(str(retention)) * LAYERS / (LAYERS - len(PAIRS)) * tokens)
    expected: dict[int, list[list[int]]] = {}
    for layer in range(LAYERS):
        weights = attention_matrix(random_attention(PROMPT, seed=layer, num_kv_heads=HEADS))
        if layer in dict(PAIRS):
            assert positions(selections[layer]) == [[]] * HEADS
            continue
        expected[layer] = []
        for head in range(HEADS):
            sums = naive_window_sums(weights, head, tokens)
            best = sorted(range(len(sums)), key=lambda at: (-sums[at], at))[: kept - 32]
            expected[layer].append([*sorted(best), *range(tokens - 32, tokens)])
        assert positions(selections[layer]) == expected[layer]
    for borrower, lender in PAIRS:
        own = random_attention(PROMPT, seed=borrower, num_kv_heads=HEADS)
        key = random_attention(PROMPT, seed=lender, num_kv_heads=HEADS).key
        weights = attention_matrix(dataclasses.replace(own, key=key))[:, 120:]
        held = sum(weights[head, :, at].sum().item() for head in range(4) for at in expected[lender][head // 2])
        assert selections[borrower].attention_mass == pytest.approx(held / weights.sum().item(), abs=1e-4)


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("base", ["snap_kv", "vl_cache"])
@given(retention=st.sampled_from(["0.01", "0.1", "0.37", "0.4", "0.9", "0.999"]), layers=st.integers(0, len(PAIRS)))
def test_the_budget_is_honoured(kind: str, base: str, retention: str, layers: int) -> None:
    prompt, policy = PROMPTS[kind], sharer(*PAIRS, layers=layers, base=base)
    budget = Budget(retention=float(retention))
    first, second = (counts(choose(policy, prompt, budget), prompt) for _ in range(2))
    assert first == second
    borrowing = lenders_of(policy, prompt, budget)
    for place, count in enumerate(first):
        assert (count == 0) if place // HEADS in borrowing else (1 <= count <= prompt.num_tokens)
    floor = LAYERS * min(prompt.num_tokens, MIN_KEPT_TOKENS)
    assert sum(first) <= HEADS * max(int(Fraction(retention) * LAYERS * prompt.num_tokens), floor)


def test_a_visual_budget_keeps_all_text_of_the_layers_that_are_left() -> None:
    budget = Budget(retention=0.1, scope=BudgetScope.VISUAL)
    selections = choose(sharer(*PAIRS), PROMPT, budget)
    for layer, selection in enumerate(selections):
        assert selection.chosen is not None
        assert selection.chosen[:, ~PROMPT.visual].all() == (layer not in dict(PAIRS))
    text = PROMPT.num_tokens - PROMPT.num_visual
    own = LAYERS - len(PAIRS)
    assert sum(counts(selections, PROMPT)) <= HEADS * (
        own * text + max(int(0.1 * LAYERS * PROMPT.num_visual), own * 16)
    )


def test_the_decode_worker_is_told_who_lends_to_whom() -> None:
    policy, budget = sharer(*PAIRS), Budget(retention=0.5)
    selections = choose(policy, PROMPT, budget)
    told = eviction_for(policy, PROMPT, budget, selections, HEADS)
    assert told == SharedLayers(borrowers=(3, 4, 5, 6), lenders=(0, 2, 2, 1))
    assert eviction_for(policy, PROMPT, Budget(retention=1.0), selections[:1] * LAYERS, HEADS) is None


def test_weights_of_which_nothing_is_known_are_refused() -> None:
    for refused in (
        lambda: KVSharer().for_checkpoint(None),
        lambda: KVSharer().sparse_prefill(PROMPT, None),  # type: ignore[arg-type]  # never looked at
    ):
        with pytest.raises(InvalidRequestError, match=r"python -m prefill_worker\.calibrate"):
            refused()


def test_more_layers_than_can_share_are_refused() -> None:
    assert sharer((2, 0), (3, 1), layers=2).pairs == ((2, 0), (3, 1))
    with pytest.raises(InvalidRequestError, match="at most 2"):
        sharer((2, 0), (3, 1), layers=3)


@pytest.mark.parametrize(("name", "value"), [("layers", -1.0), ("layers", 1.5), ("base", "mix_kv"), ("pairs", 1.0)])
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        build_policy("kv_sharer", {name: value})


def test_other_policies_need_to_know_nothing_of_a_checkpoint() -> None:
    policy = build_policy("vl_cache", {})
    assert policy.for_checkpoint(None) is policy.for_checkpoint(sharing((1, 0))) is policy
