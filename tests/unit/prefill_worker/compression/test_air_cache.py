"""AirCache against loops over logits, and the points that its paper leaves open (A1-A3)."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from statistics import fmean

import numpy as np
import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.budget import water_fill
from prefill_worker.compression.pipeline import Selection, select_tokens, statistics_for
from prefill_worker.compression.policies.air_cache import AirCache, EliteAttention, layer_signals, skewness
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.prompt_shape import PromptShape
from shared.errors import InvalidRequestError
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape, random_attention

PROMPTS = {
    "image first": prompt_shape(90, range(2, 70)),
    "image last": prompt_shape(80, range(20, 80)),
    "two images": prompt_shape(100, [*range(5, 30), *range(40, 88)]),
    "long question": prompt_shape(120, range(1, 40)),
    "two visual tokens": prompt_shape(40, (3, 4)),
}


def test_layer_shares_follow_strength_and_skewness() -> None:
    """A1."""
    assert water_fill(layer_signals([0.2, 0.4], [1.0, 3.0]), 0.1, 0.0) == pytest.approx([0.0583333, 0.1416667])


def test_signals_that_no_layer_has_say_nothing() -> None:
    assert layer_signals([0.2, 0.4], [-1.0, 0.0]) == pytest.approx([2 / 3, 4 / 3])
    assert layer_signals([0.2, 0.2], [-1.0, 2.0]) == pytest.approx([0.5, 1.5])
    assert layer_signals([0.0, 0.0], [0.0, 0.0]) == [1.0, 1.0]


def test_shares_above_one_are_redistributed() -> None:
    assert water_fill(layer_signals([0.9, 0.1, 0.1], [0.0, 0.0, 0.0]), 0.5, 0.0) == pytest.approx([1.0, 0.25, 0.25])


@pytest.mark.parametrize(
    ("values", "expected"), [([0.1, 0.1, 0.1, 0.5], 2.0), ([0.2] * 4, 0.0), ([0.1, 0.9], 0.0), ([3, 2, 1], 0.0)]
)
def test_skewness_of_a_sample(values: list[float], expected: float) -> None:
    """A2."""
    assert skewness(torch.tensor(values, dtype=torch.float64)) == pytest.approx(expected, abs=1e-12)


def given_rows(prompt: PromptShape, last: list[float]) -> LayerAttention:
    """One head whose last row attends as given; all other rows are flat."""
    size = prompt.num_tokens
    query = torch.zeros(1, size, size)
    query[0, -1] = torch.tensor(last).log()
    return LayerAttention(prompt=prompt, query=query, key=torch.eye(size)[None], value=torch.eye(size)[None], scaling=1)


def test_the_sink_is_never_elite() -> None:
    """A3: text before the image cannot see it, whatever attention it draws."""
    layer = given_rows(prompt_shape(6, (1, 2)), [0.6, 0.05, 0.05, 0.14, 0.02, 0.14])
    assert EliteAttention(range(3, 6), 0.9).elite_rows(layer) == (3, 5)


def logits_of(layer: LayerAttention) -> np.ndarray:
    keys = layer.key.double().repeat_interleave(layer.group, dim=0)
    return (layer.query.double() @ keys.mT * layer.scaling).numpy()


def naive_rows(prompt: PromptShape, max_rows: int) -> list[int]:
    visual = prompt.visual.nonzero().flatten().tolist()
    after = [row for row in range(prompt.num_tokens) if row > max(visual)]
    rows = after or [row for row in range(prompt.num_tokens) if row >= prompt.num_tokens - 50]
    return rows[-max_rows:] if max_rows else rows


def naive_softmax(logits: dict[int, float]) -> dict[int, float]:
    top = max(logits.values())
    total = sum(math.exp(value - top) for value in logits.values())
    return {key: math.exp(value - top) / total for key, value in logits.items()}


def naive_importance(layer: LayerAttention, policy: AirCache) -> list[dict[int, float]]:
    """Per query head, of each visual token."""
    prompt, logits = layer.prompt, logits_of(layer)
    visual = prompt.visual.nonzero().flatten().tolist()
    rows = naive_rows(prompt, policy.max_rows)
    text = [key for key in range(prompt.num_tokens) if key not in visual or key in rows]
    last = [naive_softmax({key: head[rows[-1], key] for key in text}) for head in logits]
    weights = {row: fmean(head[row] for head in last) for row in rows}
    elite = [row for row in rows if weights[row] >= policy.elite_share * max(weights.values())]
    importance = []
    for head in logits:
        received = dict.fromkeys(visual, 0.0)
        for row in elite:
            keys = [key for key in range(row + 1) if key in visual or key in elite]
            for key, weight in naive_softmax({key: head[row, key] for key in keys}).items():
                if key in received:
                    received[key] += weight / len(elite)
        importance.append(received)
    return importance


def naive_text(layer: LayerAttention, policy: AirCache) -> list[dict[int, float]]:
    """Per query head, attention of all candidates to each text token."""
    logits, visual = logits_of(layer), layer.prompt.visual.tolist()
    received = []
    for head in logits:
        sums = {key: 0.0 for key, image in enumerate(visual) if not image}
        for row in naive_rows(layer.prompt, policy.max_rows):
            for key, weight in naive_softmax({key: head[row, key] for key in range(row + 1)}).items():
                if key in sums:
                    sums[key] += weight
        received.append(sums)
    return received


def best(scores: list[dict[int, float]], wanted: int) -> list[int]:
    """By the mean over heads."""
    order = sorted(scores[0], key=lambda key: (-sum(head[key] for head in scores), key))
    return order[:wanted]


def naive_kept(layer: LayerAttention, policy: AirCache, kept: int) -> list[list[int]]:
    groups = [range(4)] * 2 if policy.shared else [range(2), range(2, 4)]
    importance, text = naive_importance(layer, policy), naive_text(layer, policy)
    chosen = []
    for heads in groups:
        first = best([text[head] for head in heads], kept)
        chosen.append(sorted([*first, *best([importance[head] for head in heads], kept - len(first))]))
    return chosen


def select(layers: list[LayerAttention], policy: AirCache, budget: Budget) -> list[Selection]:
    return select_tokens(policy, [observe(policy, layer) for layer in layers], budget)


@pytest.mark.parametrize("policy", [AirCache(), AirCache(shared=True), AirCache(max_rows=7, elite_share=0.3)])
@pytest.mark.parametrize("kept", [18, 60])
@pytest.mark.parametrize("kind", PROMPTS)
def test_kept_sets_are_those_of_the_naive_method(kind: str, kept: int, policy: AirCache) -> None:
    layer = random_attention(PROMPTS[kind], seed=3, spread=3.0)
    (selection,) = select([layer], policy, Budget(max_kept_tokens=min(kept, PROMPTS[kind].num_tokens)))
    assert positions(selection) == naive_kept(layer, policy, min(kept, PROMPTS[kind].num_tokens))


def naive_shares(layers: list[LayerAttention], r: float) -> list[float]:
    """Without clipping: the layers of these tests stay below 1."""
    images = []
    for layer in layers:
        heads = naive_importance(layer, AirCache())
        images.append([fmean(head[key] for head in heads) for key in heads[0]])
    strength = [sum(image) for image in images]
    skew = []
    for image in images:
        n, mean = len(image), fmean(image)
        sigma = math.sqrt(sum((value - mean) ** 2 for value in image) / (n - 1))
        skew.append(max(0.0, n / ((n - 1) * (n - 2)) * sum(((value - mean) / sigma) ** 3 for value in image)))
    return [(s / fmean(strength) + k / fmean(skew)) / 2 * r for s, k in zip(strength, skew, strict=True)]


@pytest.mark.parametrize("scope", BudgetScope)
def test_layer_budgets_are_those_of_the_naive_method(scope: BudgetScope) -> None:
    prompt, retention = PROMPTS["image first"], 0.4
    layers = [random_attention(prompt, seed=seed, spread=1.0 + seed) for seed in range(3)]
    visual, text = prompt.num_visual, prompt.num_tokens - prompt.num_visual
    total = int(Fraction("0.4") * 3 * prompt.num_tokens) - 3 * text if scope is BudgetScope.CACHE else 0
    total = total or int(Fraction("0.4") * 3 * visual)
    selections = select(layers, AirCache(), Budget(retention=retention, scope=scope))
    counts = [selection.num_kept(2, prompt.num_tokens)[0] - text for selection in selections]
    wanted = [share * visual for share in naive_shares(layers, total / 3 / visual)]
    assert sum(counts) == total
    assert len(set(counts)) == 3
    assert all(abs(count - want) < 1 for count, want in zip(counts, wanted, strict=True))


def test_text_that_does_not_fit_is_cut_by_attention_and_no_visual_token_is_kept() -> None:
    prompt = PROMPTS["long question"]
    layers = [random_attention(prompt, seed=seed) for seed in range(2)]
    for layer, selection in zip(layers, select(layers, AirCache(), Budget(retention=0.25)), strict=True):
        assert positions(selection) == [
            sorted(best(naive_text(layer, AirCache())[2 * head : 2 * head + 2], 30)) for head in range(2)
        ]


def test_rows_that_see_no_visual_token_leave_no_number_undefined() -> None:
    """Weights of visual keys that vanish in fp32."""
    layer = random_attention(PROMPTS["image first"], seed=1)
    blind = dataclasses.replace(layer, key=layer.key.clone(), query=layer.query.abs() + 1)
    blind.key[:, layer.prompt.visual] = -1e4
    scores = AirCache().score(observe(AirCache(), blind))
    assert not scores.isnan().any()


@pytest.mark.parametrize("shared", [True, False])
def test_a_prompt_without_an_image_is_vl_caches(shared: bool) -> None:
    prompt = prompt_shape(150)
    layers = [random_attention(prompt, seed=seed, spread=1.0 + seed) for seed in range(2)]
    policy, other = AirCache(max_rows=20, shared=shared), VLCache(max_rows=20, shared_heads=shared)
    assert statistics_for(policy, prompt) == statistics_for(other, prompt)
    expected = select_tokens(other, [observe(other, layer) for layer in layers], Budget(retention=0.3))
    for ours, theirs in zip(select(layers, policy, Budget(retention=0.3)), expected, strict=True):
        assert positions(ours) == positions(theirs)


@pytest.mark.parametrize("parameters", [{"elite_share": 0.0}, {"elite_share": 1.1}, {"max_rows": -1}])
def test_bad_parameters_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        AirCache(**parameters)  # type: ignore[arg-type]
