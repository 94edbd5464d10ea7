"""KVMerger: runs, pivots and Gaussian means against loops."""

from __future__ import annotations

import math

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.kv_merger import KVMerger, pivots_of, runs_of
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

TOKENS = 160
PROMPT = prompt_shape(TOKENS, range(3, 130), seed=2)


def smooth_attention(seed: int) -> LayerAttention:
    """Keys that stay near one another for some tokens, then jump."""
    layer = random_attention(PROMPT, seed=seed, spread=1.0)
    jumps = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(seed)) < 0.3
    centres = layer.key.gather(1, jumps.long().cumsum(dim=1)[..., None].expand_as(layer.key))
    layer.key = 0.4 * layer.key.flip(1) + centres
    return layer


def naive_runs(key: torch.Tensor, threshold: float) -> list[list[int]]:
    """One KV head."""
    runs = [[0]]
    for at in range(1, TOKENS):
        if torch.cosine_similarity(key[at - 1], key[at], dim=0).item() > threshold:
            runs[-1].append(at)
        else:
            runs.append([at])
    return runs


def naive_choice(attention: torch.Tensor, runs: list[list[int]], kept: int) -> list[int]:
    """One KV head; attention is [group, tokens, tokens]."""
    scores = attention.sum(dim=(0, 1)).tolist()
    pivots = [max(run, key=lambda at: (scores[at], -at)) for run in runs]
    worth = {pivot: sum(scores[at] for at in run) for pivot, run in zip(pivots, runs, strict=True)}
    window = int(kept * 0.3 + 1e-9)
    older = [at for at in range(TOKENS - window)]
    order = sorted(older, key=lambda at: (at not in worth, -worth.get(at, scores[at]), at))
    return sorted([*order[: kept - window], *range(TOKENS - window, TOKENS)])


def naive_merge(layer: ObservedLayer, head: int, runs: list[list[int]], chosen: list[int]) -> list[list[torch.Tensor]]:
    """One KV head, [key or value][kept]."""
    members: dict[int, list[int]] = {at: [] for at in chosen}
    for run in runs:
        pivots = [at for at in run if at in members]
        for at in run:
            if pivots and at not in members:
                members[min(pivots, key=lambda pivot: (abs(pivot - at), pivot))].append(at)
    merged: list[list[torch.Tensor]] = [[], []]
    for place, joined in members.items():
        key = layer.key[head].double()
        distances = [(key[place] - key[at]).norm().item() for at in joined]
        sigma = sum(distances) / len(distances) if joined else 1.0
        weights = [math.exp(-(distance**2) / (2 * sigma**2)) for distance in distances]
        for rows, whole in zip(merged, (layer.key, layer.value), strict=True):
            whole = whole[head].double()
            total = whole[place] + sum(weight * whole[at] for at, weight in zip(joined, weights, strict=True))
            rows.append(total / (1 + sum(weights)))
    return merged


@pytest.mark.parametrize("kept", [20, 60, 110])
def test_it_is_the_naive_method(kept: int) -> None:
    """From fewer places than runs to more."""
    policy = KVMerger()
    attention = smooth_attention(4)
    layer = observe(policy, attention)
    (selection,) = select_tokens(policy, [layer], Budget(max_kept_tokens=kept))
    runs = [naive_runs(layer.key[head].double(), 0.75) for head in range(2)]
    assert all(20 < len(of_head) < 110 for of_head in runs)
    matrix = attention_matrix(attention).view(2, 2, TOKENS, TOKENS)
    chosen = [naive_choice(matrix[head], runs[head], kept) for head in range(2)]
    assert positions(selection) == chosen
    assert selection.merged is not None
    expected = [naive_merge(layer, head, runs[head], chosen[head]) for head in range(2)]
    for index, merged in enumerate(selection.merged):
        whole = torch.stack([row for head in expected for row in head[index]])
        torch.testing.assert_close(merged.double(), whole, rtol=1e-5, atol=1e-5)


def test_runs_and_pivots_count_through_all_heads_and_ties_go_to_the_lower_position() -> None:
    key = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]], [[0.0, 1.0], [0.0, 2.0], [0.1, 3.0]]])
    runs = runs_of(key, 0.75)
    assert runs.tolist() == [[0, 0, 1], [2, 2, 2]]
    attention = torch.tensor([[0.5, 0.5, 0.1], [0.1, 0.2, 0.2]])
    assert pivots_of(attention, runs).tolist() == [[True, False, True], [False, True, False]]


def test_equal_keys_merge_into_their_mean() -> None:
    layer = ObservedLayer(
        prompt=prompt_shape(4), key=torch.ones(1, 4, 2), value=torch.arange(4.0).view(1, 4, 1), measured={}
    )
    key, value = KVMerger().merge(layer, torch.tensor([[False, True, False, False]]))
    assert key.tolist() == [[1.0, 1.0]]
    assert value.tolist() == [[1.5]]


def test_text_that_always_stays_needs_no_pivot() -> None:
    policy = KVMerger(threshold=-1.0)
    layer = observe(policy, smooth_attention(4))
    budget = Budget(retention=0.2, scope=BudgetScope.VISUAL)
    (selection,) = select_tokens(policy, [layer], budget)
    assert selection.chosen is not None
    assert selection.chosen[:, ~PROMPT.visual].all()


@pytest.mark.parametrize("parameters", [{"rows": "some"}, {"recent_share": 1.1}, {"threshold": 1.5}])
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        KVMerger(**parameters)  # type: ignore[arg-type]
