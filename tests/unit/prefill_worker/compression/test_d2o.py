"""D2O: shares of layers, and loops over the attention matrix."""

from __future__ import annotations

import math

import pytest
import torch

from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.d2o import D2O, shares_by_variance
from prefill_worker.compression.rows import probe_rows
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

TOKENS, LAYERS = 240, 3
PROMPT = prompt_shape(TOKENS, range(5, 200), seed=7)


def test_even_attention_gets_more() -> None:
    shares = shares_by_variance([1.0, 3.0, 2.0])
    weights = [math.exp(-signal) for signal in (0.0, 1.0, 0.5)]
    assert shares == pytest.approx([weight / sum(weights) for weight in weights])


@pytest.mark.parametrize("variances", [[0.0, 0.0], [0.25, 0.25], [7.0]])
def test_equal_variances_share_equally(variances: list[float]) -> None:
    assert shares_by_variance(variances) == pytest.approx([1 / len(variances)] * len(variances))


def naive_scores(attention: torch.Tensor, rows: str) -> list[float]:
    """One KV head; attention is [group, tokens, tokens]."""
    listed = list(range(TOKENS) if rows == "all" else probe_rows(PROMPT))
    summed = attention.sum(dim=0)[listed].tolist()
    sums = [sum(row[at] for row in summed) for at in range(TOKENS)]
    return sums if rows == "all" else [total / sum(row >= at for row in listed) for at, total in enumerate(sums)]


def naive_budgets(scores: list[list[list[float]]], retention: float) -> list[float]:
    """Tokens of each layer before rounding, where no clip acts; scores are [layer][head][token]."""
    variances = []
    for layer in scores:
        means = [sum(head) / TOKENS for head in layer]
        heads = [sum((s - mean) ** 2 for s in head) / TOKENS for head, mean in zip(layer, means, strict=True)]
        variances.append(sum(heads) / len(heads))
    low, high = min(variances), max(variances)
    weights = [math.exp(-(variance - low) / (high - low)) for variance in variances]
    return [weight / sum(weights) * LAYERS * retention * TOKENS for weight in weights]


def naive_choice(scores: list[float], kept: int) -> list[int]:
    window = kept // 2
    best = sorted(range(4, TOKENS - window), key=lambda at: (-scores[at], at))[: kept - window - 4]
    return sorted([*range(4), *best, *range(TOKENS - window, TOKENS)])


def naive_merge(key: torch.Tensor, value: torch.Tensor, chosen: list[list[int]]) -> list[torch.Tensor]:
    """Keys and values [kept rows, dim] of all heads."""
    joined = {}
    for head, kept in enumerate(chosen):
        for at in set(range(TOKENS)) - set(kept):
            cosines = [torch.cosine_similarity(key[head, at], key[head, other], dim=0).item() for other in kept]
            joined[head, at] = max(cosines), kept[cosines.index(max(cosines))]
    threshold = sum(cosine for cosine, _ in joined.values()) / len(joined)
    merged: list[list[torch.Tensor]] = [[], []]
    for head, kept in enumerate(chosen):
        for place in kept:
            members = [
                (at, cosine)
                for (of, at), (cosine, target) in joined.items()
                if of == head and target == place and cosine >= threshold
            ]
            for rows, whole in zip(merged, (key, value), strict=True):
                total = whole[head, place] + sum(cosine * whole[head, at] for at, cosine in members)
                rows.append(total / (1 + len(members)))
    return [torch.stack(rows) for rows in merged]


@pytest.mark.parametrize("rows", ["all", "probe"])
def test_it_is_the_naive_method(rows: str) -> None:
    policy = D2O(rows=rows)
    attentions = [random_attention(PROMPT, seed=seed, spread=1.0 + seed) for seed in range(LAYERS)]
    layers = [observe(policy, attention) for attention in attentions]
    selections = select_tokens(policy, layers, Budget(retention=0.2))
    matrices = [attention_matrix(attention).view(2, 2, TOKENS, TOKENS) for attention in attentions]
    scores = [[naive_scores(head, rows) for head in matrix] for matrix in matrices]
    kept = [selection.num_kept(2, TOKENS) for selection in selections]
    assert sum(sum(heads) for heads in kept) == 2 * LAYERS * TOKENS // 5
    for wanted, heads in zip(naive_budgets(scores, 0.2), kept, strict=True):
        assert heads[0] == heads[1]
        assert abs(heads[0] - wanted) < 1
    for layer, heads, selection in zip(layers, scores, selections, strict=True):
        chosen = [naive_choice(head, selection.num_kept(2, TOKENS)[0]) for head in heads]
        assert positions(selection) == chosen
        assert selection.merged is not None
        expected = naive_merge(layer.key.double(), layer.value.double(), chosen)
        for merged, whole in zip(selection.merged, expected, strict=True):
            torch.testing.assert_close(merged.double(), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameters", [{"rows": "some"}, {"recent_share": 1.1}, {"sinks": -1}, {"sinks": 17}])
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        D2O(**parameters)  # type: ignore[arg-type]
