"""ZipVL against loops over the attention matrix; the pass itself is tested with the engine."""

from __future__ import annotations

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.zip_vl import ZipVL
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import probe_rows
from prefill_worker.compression.sparse.zip_vl import ImportantTokens, ZipVLPrefill
from shared.errors import InvalidRequestError
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)
from tests.unit.prefill_worker.naive_sparse import naive_importance

PROMPTS = [prompt_shape(180, range(3, 150), seed=4), prompt_shape(180, seed=9), prompt_shape(70, range(20, 70))]


def layer_with(rows: dict[int, list[float]], num_tokens: int) -> LayerAttention:
    """One head whose attention has these rows."""
    query = torch.zeros(1, num_tokens, num_tokens)
    for row, weights in rows.items():
        query[0, row, : row + 1] = torch.tensor(weights).log()
    key = torch.eye(num_tokens)[None]
    return LayerAttention(prompt=prompt_shape(num_tokens), query=query, key=key, value=key, scaling=1.0)


def test_z1() -> None:
    layer = layer_with({1: [0.8, 0.2], 3: [0.3, 0.05, 0.2, 0.45]}, num_tokens=4)
    found = ImportantTokens((1, 3), 0.88).measure(layer)
    assert found.chosen.nonzero().flatten().tolist() == [0, 2, 3]
    torch.testing.assert_close(found.scores[:3], torch.tensor([0.55, 0.125, 0.2]))


def test_the_last_token_is_important_whatever_it_receives() -> None:
    layer = layer_with({2: [0.1, 0.1, 0.8], 3: [0.6, 0.2, 0.19, 0.01]}, num_tokens=4)
    assert ImportantTokens((2, 3), 0.5).measure(layer).chosen.tolist() == [False, False, True, True]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["image", "text", "short"])
@pytest.mark.parametrize("theta", [0.01, 0.5, 0.96, 1.0])
def test_important_tokens_are_those_of_the_loops(prompt: PromptShape, theta: float) -> None:
    layer, rows = random_attention(prompt, seed=3, spread=4.0), probe_rows(prompt)
    found = ImportantTokens(rows, theta).measure(layer)
    chosen, scores = naive_importance(attention_matrix(layer).tolist(), rows, theta)
    if theta < 1:  # at 1 the last roundings decide whether the faintest tokens count
        assert found.chosen.nonzero().flatten().tolist() == chosen
    torch.testing.assert_close(found.scores[:-1].double(), torch.tensor(scores[:-1]).double(), rtol=1e-4, atol=1e-7)
    assert found.scores[-1] == torch.inf


def test_only_the_important_attend_and_among_themselves() -> None:
    layer, statistic = random_attention(PROMPTS[0], seed=6, spread=4.0), ImportantTokens(probe_rows(PROMPTS[0]), 0.8)
    measured = {statistic: statistic.measure(layer)}
    among = measured[statistic].chosen.nonzero().flatten().tolist()
    output = ZipVLPrefill(statistic).attend(layer, measured)
    keys = layer.key.double().repeat_interleave(layer.group, dim=0)
    values = layer.value.double().repeat_interleave(layer.group, dim=0)
    for row in range(PROMPTS[0].num_tokens):
        expected = torch.zeros(len(keys), keys.shape[2], dtype=torch.float64)
        if row in among:
            seen = [at for at in among if at <= row]
            logits = (keys[:, seen] @ layer.query[:, row].double()[:, :, None])[:, :, 0] * layer.scaling
            expected = (logits.softmax(dim=-1)[:, None] @ values[:, seen])[:, 0]
        torch.testing.assert_close(output[:, row].double(), expected, rtol=1e-5, atol=1e-5)


def select(policy: ZipVL, budget: Budget, prompt: PromptShape = PROMPTS[0]) -> tuple[list[list[int]], list[list[int]]]:
    """Kept and important positions per layer of three of growing sparsity."""
    layers = [observe(policy, random_attention(prompt, seed=seed, spread=1.0 + 3 * seed)) for seed in range(3)]
    kept = []
    for selection in select_tokens(policy, layers, budget):
        heads = positions(selection)
        assert heads == [heads[0]] * 2, "one set for all heads"
        kept.append(heads[0])
    (statistic,) = policy.needs(prompt)
    return kept, [layer[statistic].chosen.nonzero().flatten().tolist() for layer in layers]


def test_a_generous_retention_keeps_what_is_important() -> None:
    kept, important = select(ZipVL(), Budget(retention=0.99))
    assert kept == important
    assert len(kept[0]) > len(kept[1]) > len(kept[2]), "sparser layers keep less"


def test_a_tight_retention_cuts_the_important_in_proportion() -> None:
    kept, important = select(ZipVL(), Budget(retention=0.3))
    assert all(set(some) < set(all_) for some, all_ in zip(kept, important, strict=True))
    total = 162
    assert sum(map(len, kept)) == total
    share = total / sum(map(len, important))
    assert [len(some) for some in kept] == pytest.approx([share * len(all_) for all_ in important], abs=1)


def test_a_visual_budget_counts_important_image_tokens() -> None:
    kept, important = select(ZipVL(), Budget(retention=0.99, scope=BudgetScope.VISUAL))
    visual = PROMPTS[0].visual
    text = (~visual).nonzero().flatten().tolist()
    assert kept == [sorted({*text, *(at for at in layer if visual[at])}) for layer in important]


@pytest.mark.parametrize("theta", [0.0, -1.0, 1.1, float("nan")])
def test_bad_parameters_are_refused(theta: float) -> None:
    with pytest.raises(InvalidRequestError, match="theta"):
        ZipVL(theta=theta)
