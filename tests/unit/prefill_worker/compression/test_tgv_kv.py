"""TGV-KV against loops over the attention matrix."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import Selection, select_tokens
from prefill_worker.compression.policies.tgv_kv import TGVKV
from prefill_worker.compression.prompt_shape import PromptShape
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

PROMPTS = {
    "image first": prompt_shape(90, range(2, 70)),
    "image last": prompt_shape(80, range(20, 80)),
    "two images": prompt_shape(100, [*range(5, 30), *range(40, 88)]),
    "long question": prompt_shape(150, range(1, 40)),
    "text": prompt_shape(70),
}


def head_mean(layer: LayerAttention) -> list[list[float]]:
    return attention_matrix(layer).mean(dim=0).tolist()


def naive_rows(prompt: PromptShape, max_rows: int) -> list[int]:
    visual = prompt.visual.nonzero().flatten().tolist()
    after = [row for row in range(prompt.num_tokens) if row > max(visual, default=prompt.num_tokens)]
    rows = after or [row for row in range(prompt.num_tokens) if row >= prompt.num_tokens - 50]
    return rows[-max_rows:] if max_rows else rows


def naive_order(layer: LayerAttention, max_rows: int) -> list[int]:
    """All tokens, the best first."""
    prompt, attention = layer.prompt, head_mean(layer)
    rows, end = naive_rows(prompt, max_rows), prompt.num_tokens
    worth = {row: sum(attention[i][row] for i in rows) / len([i for i in rows if i >= row]) for row in rows}
    protected, text, visual = [], {}, {}
    for key in range(end):
        if key < 4 or key == end - 1:
            protected.append(key)
        elif prompt.visual[key]:
            visual[key] = sum(worth[row] * attention[row][key] for row in rows)
        else:
            text[key] = sum(attention[row][key] for row in rows)
    return [*protected, *(key for group in (text, visual) for key in sorted(group, key=lambda key: (-group[key], key)))]


def naive_budget(layers: list[LayerAttention], max_rows: int, retention: str, fewest: int = 16) -> list[int]:
    """clip(c * mass, low, 1) with the exact mean: c from the breakpoints of a piecewise linear function."""
    prompt = layers[0].prompt
    masses = []
    for layer in layers:
        attention, rows = head_mean(layer), naive_rows(prompt, max_rows)
        visual = prompt.visual.nonzero().flatten().tolist()
        masses.append(sum(attention[row][key] for row in rows for key in visual))
    low, wanted = fewest / prompt.num_tokens, float(Fraction(retention)) * len(layers)

    def total(c: float) -> float:
        return sum(min(1.0, max(low, c * mass)) for mass in masses)

    points = sorted({0.0, *(low / mass for mass in masses), *(1 / mass for mass in masses)})
    left, right = next((a, b) for a, b in itertools.pairwise(points) if total(a) <= wanted < total(b))
    c = left + (wanted - total(left)) / (total(right) - total(left)) * (right - left)
    shares = [min(1.0, max(low, c * mass)) * prompt.num_tokens for mass in masses]
    kept = [math.floor(share + 1e-6) for share in shares]
    missing = math.floor(Fraction(retention) * len(layers) * prompt.num_tokens) - sum(kept)
    for layer in sorted(range(len(layers)), key=lambda at: (kept[at] - shares[at], at))[:missing]:
        kept[layer] += 1
    return kept


def select(layers: list[LayerAttention], policy: TGVKV, budget: Budget) -> list[Selection]:
    return select_tokens(policy, [observe(policy, layer) for layer in layers], budget)


@pytest.mark.parametrize("max_rows", [64, 0, 5])
@pytest.mark.parametrize("kept", [17, 50])
@pytest.mark.parametrize("kind", PROMPTS)
def test_kept_sets_are_those_of_the_naive_method(kind: str, kept: int, max_rows: int) -> None:
    layer = random_attention(PROMPTS[kind], seed=5, spread=3.0)
    (selection,) = select([layer], TGVKV(max_rows=max_rows), Budget(max_kept_tokens=kept))
    assert positions(selection) == [sorted(naive_order(layer, max_rows)[:kept])] * 2


def drawn_to_the_image(prompt: PromptShape, seed: int) -> LayerAttention:
    """The larger the seed, the more the text looks at the image."""
    layer = random_attention(prompt, seed=seed)
    layer.key[:, prompt.visual, 0] += 2.0 * seed
    layer.query[..., 0] = layer.query[..., 0].abs()
    return layer


@pytest.mark.parametrize("retention", ["0.3", "0.4", "0.8"])
@pytest.mark.parametrize("kind", ["image first", "image last", "long question"])
def test_layers_share_by_the_attention_from_text_to_image(kind: str, retention: str) -> None:
    layers = [drawn_to_the_image(PROMPTS[kind], seed) for seed in range(3)]
    expected = naive_budget(layers, 64, retention)
    assert len(set(expected)) > 1
    selections = select(layers, TGVKV(), Budget(retention=float(retention)))
    assert [selection.num_kept(2, PROMPTS[kind].num_tokens) for selection in selections] == [[k, k] for k in expected]


def test_without_an_image_layers_share_alike() -> None:
    layers = [random_attention(PROMPTS["text"], seed, spread=1.0 + seed) for seed in range(2)]
    selections = select(layers, TGVKV(), Budget(retention=0.5))
    assert [selection.num_kept(2, 70) for selection in selections] == [[35, 35]] * 2


def test_text_outranks_vision_however_little_attention_it_gets() -> None:
    layer = random_attention(PROMPTS["image first"], seed=6)
    layer.key[:, ~layer.prompt.visual, 0] -= 50.0
    layer.query[..., 0] = layer.query[..., 0].abs() + 1
    (selection,) = select([layer], TGVKV(), Budget(max_kept_tokens=24))
    text = (~layer.prompt.visual).nonzero().flatten().tolist()
    assert all(set(text) <= set(head) for head in positions(selection))
    received = observe(TGVKV(), layer)[TGVKV().needs(layer.prompt)[0]].received
    assert received[torch.tensor(text[:-1])].max() < received[layer.prompt.visual].max()


def test_bad_parameters_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_rows"):
        TGVKV(max_rows=-1)
