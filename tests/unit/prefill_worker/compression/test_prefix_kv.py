"""PrefixKV against giving one token at a time, and against loops over the attention matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.prefix_kv import PrefixKV, lowest_first
from prefill_worker.compression.rows import probe_rows
from shared.errors import InvalidRequestError
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

TOKENS, VISUAL = 150, range(10, 130)
PROMPT = prompt_shape(TOKENS, VISUAL, seed=3)
LAYERS = [random_attention(PROMPT, seed, spread=0.5 + 1.5 * seed) for seed in range(3)]


def one_by_one(curves: list[list[float]], total: int) -> list[int]:
    """P_l(o) of `curves[l][o]`, o tokens kept; each token goes to the layer with the lowest."""
    kept = [0] * len(curves)
    for _ in range(total):
        open_layers = [layer for layer, curve in enumerate(curves) if kept[layer] < len(curve) - 1]
        kept[min(open_layers, key=lambda layer: (curves[layer][kept[layer]], layer))] += 1
    return kept


def test_the_layer_that_has_kept_least_gets_the_next_token() -> None:
    curves = [[0, 0.7, 0.9, 0.95, 1], [0, 0.4, 0.7, 0.9, 1]]
    assert lowest_first(torch.tensor(curves)[:, :-1], 3) == one_by_one(curves, 3) == [1, 2]


@given(
    layers=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_it_is_the_same_as_giving_one_token_at_a_time(layers: list[list[int]], share: float) -> None:
    masses = torch.tensor(layers).cumsum(dim=1)
    curves = [[0, *row] for row in masses.tolist()]
    total = max(1, int(share * masses.numel()))
    before = torch.tensor(curves)[:, :-1]
    assert lowest_first(before, total) == one_by_one(curves, total)


def naive(visual_scope: bool, rows: str, total: int) -> list[list[int]]:
    """What each layer keeps, from every row of every head."""
    listed = [*range(TOKENS)] if rows == "all" else list(probe_rows(PROMPT))
    orders, curves = [], []
    for layer in LAYERS:
        mean = attention_matrix(layer).mean(dim=0).tolist()
        sums = [sum(mean[row][key] for row in listed) for key in range(TOKENS)]
        if rows == "probe":
            sums = [value / sum(row >= key for row in listed) for key, value in enumerate(sums)]
        protected = {0, 1, 2, 3, TOKENS - 1}
        stays = [at for at in range(TOKENS) if at not in VISUAL] if visual_scope else []
        others = [at for at in range(TOKENS) if at not in stays]
        order = stays + sorted(others, key=lambda at: (at not in protected, -sums[at], at))
        kept = [sum(sums[at] for at in order[:count]) / sum(sums) for count in range(len(stays), TOKENS + 1)]
        # the first 16 come whatever they weigh
        curves.append([-1.0] * 16 + kept[16:])
        orders.append(order)
    text = TOKENS + 1 - len(curves[0])
    return [sorted(order[: text + count]) for order, count in zip(orders, one_by_one(curves, total), strict=True)]


@pytest.mark.parametrize("rows", ["all", "probe"])
@pytest.mark.parametrize("visual_scope", [False, True])
def test_it_is_the_naive_method(rows: str, visual_scope: bool) -> None:
    policy, scope = PrefixKV(rows=rows), BudgetScope.VISUAL if visual_scope else BudgetScope.CACHE
    selections = select_tokens(policy, [observe(policy, layer) for layer in LAYERS], Budget(retention=0.3, scope=scope))
    expected = naive(visual_scope, rows, total=3 * (36 if visual_scope else 45))
    assert [positions(chosen) for chosen in selections] == [[kept] * 2 for kept in expected]
    assert len({len(kept) for kept in expected}) == 3, "layers that differ"


def test_both_ends_stay_and_no_layer_starves() -> None:
    policy = PrefixKV()
    for chosen in select_tokens(policy, [observe(policy, layer) for layer in LAYERS], Budget(retention=0.11)):
        for head in positions(chosen):
            assert {0, 1, 2, 3, TOKENS - 1} < set(head)
            assert len(head) >= 16


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="rows must be one of all, probe"):
        PrefixKV(rows="some")
