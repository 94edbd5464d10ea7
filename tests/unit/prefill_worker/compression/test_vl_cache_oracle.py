"""The whole method against the naive one, on a model that returns its attention matrices (`eager`)."""

import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from prefill_worker.compression.pipeline import Selection, select_tokens, statistics_for
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.statistics import ObservedLayer
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.request.params import Budget
from tests.unit.decode_worker.tiny import KV_HEADS, LAYERS, tokenizer
from tests.unit.prefill_worker.compression import vl_cache_oracle as oracle
from tests.unit.prefill_worker.compression.observing import positions, prompt_shape
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, raw_prompt, user

IMAGE = tokenizer().convert_tokens_to_ids("<image>")
PROMPTS = ["image", "two images", "long question", "text", "image last"]


def prompt_of(kind: str, builder: PromptBuilder) -> Prompt:
    image, other = encoded(picture(1)), encoded(picture(2))
    if kind == "image last":
        first = builder.build([user(image, QUESTION)], max_new_tokens=1)
        ids = [token for token in first.inputs["input_ids"][0].tolist() if token != IMAGE]
        ids += [IMAGE] * first.shape.num_visual
        shape = prompt_shape(len(ids), range(len(ids) - first.shape.num_visual, len(ids)))
        return raw_prompt(ids, shape, pixel_values=first.inputs["pixel_values"])
    parts = {
        "image": (image, QUESTION),
        "two images": (image, other, "What differs? " + QUESTION),
        "long question": (image, QUESTION * 9),
        "text": (QUESTION * 3,),
    }[kind]
    return builder.build([user(*parts)], max_new_tokens=1)


def attention_of(whole: Any, prompt: Prompt) -> list[np.ndarray]:
    with torch.inference_mode():
        output = whole(**prompt.inputs, position_ids=prompt.position_ids, output_attentions=True)
    return [layer[0].double().numpy() for layer in output.attentions]


def visual_positions(prompt: Prompt) -> list[int]:
    return [at for at, token in enumerate(prompt.inputs["input_ids"][0].tolist()) if token == IMAGE]


def observe(engine: PrefillEngine, prompt: Prompt, policy: VLCache) -> list[ObservedLayer]:
    prefilled = engine.prefill(prompt, statistics_for(policy, prompt.shape), threading.Event())
    return prefilled.observed(prompt.shape)


def select(engine: PrefillEngine, prompt: Prompt, policy: VLCache, retention: str) -> list[Selection]:
    return select_tokens(policy, observe(engine, prompt, policy), Budget(retention=float(retention)))


@pytest.mark.parametrize("max_rows", [64, 0, 5])
@pytest.mark.parametrize("kind", PROMPTS)
def test_statistics_are_those_of_the_attention_matrix(
    engine: PrefillEngine, whole: Any, builder: PromptBuilder, kind: str, max_rows: int
) -> None:
    prompt, policy = prompt_of(kind, builder), VLCache(max_rows=max_rows, threshold=0.05, shared_heads=False)
    rows = oracle.observed_rows(visual_positions(prompt), prompt.shape.num_tokens, max_rows)
    layers = observe(engine, prompt, policy)
    assert len(layers) == LAYERS
    for layer, attention in zip(layers, attention_of(whole, prompt), strict=True):
        assert policy.sparsity(layer) == pytest.approx(oracle.sparsity(attention, rows, 0.05), abs=1e-12)
        np.testing.assert_allclose(
            policy.score(layer), oracle.token_scores(attention, rows, KV_HEADS), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("budget", ["strict", "paper"])
@pytest.mark.parametrize("retention", ["0.15", "0.4", "0.7"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_budgets_and_kept_sets_are_those_of_the_naive_method(
    engine: PrefillEngine, whole: Any, builder: PromptBuilder, kind: str, retention: str, budget: str
) -> None:
    prompt = prompt_of(kind, builder)
    policy = VLCache(budget=budget, min_tokens=1, threshold=0.05, shared_heads=False)
    tokens, share = prompt.shape.num_tokens, Fraction(retention)
    selections = select(engine, prompt, policy, retention)

    attention = attention_of(whole, prompt)
    rows = oracle.observed_rows(visual_positions(prompt), tokens)
    allocate = oracle.strict_tokens if budget == "strict" else oracle.paper_tokens
    kept = allocate([oracle.sparsity(layer, rows, 0.05) for layer in attention], share, tokens, 1)
    assert len(set(kept)) > 1, "the layers differ, or this test compares nothing"
    for selection, layer, count in zip(selections, attention, kept, strict=True):
        scores = oracle.token_scores(layer, rows, KV_HEADS)
        expected = [oracle.kept_tokens(head, count, recent_tenths=1) for head in scores]
        assert positions(selection) == expected
        mass = sum(sum(head[at] for at in chosen) for head, chosen in zip(scores, expected, strict=True))
        assert selection.attention_mass == pytest.approx(mass / sum(map(sum, scores)), abs=1e-5)


def test_shared_heads_score_by_the_sum_over_all_heads(
    engine: PrefillEngine, whole: Any, builder: PromptBuilder
) -> None:
    prompt, policy = prompt_of("image", builder), VLCache(min_tokens=2, recent_share=0.0)
    selections = select(engine, prompt, policy, "0.25")
    rows = oracle.observed_rows(visual_positions(prompt), prompt.shape.num_tokens)
    for selection, attention in zip(selections, attention_of(whole, prompt), strict=True):
        (scores,) = oracle.token_scores(attention, rows, 1)
        kept = selection.num_kept(KV_HEADS, prompt.shape.num_tokens)
        assert positions(selection) == [oracle.kept_tokens(scores, kept[0], recent_tenths=0)] * KV_HEADS
