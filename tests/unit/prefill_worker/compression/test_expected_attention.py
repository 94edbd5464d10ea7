"""Expected Attention on a model, against its queries before rotation and plain float64."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from prefill_worker.compression.pipeline import select_tokens, statistics_for
from prefill_worker.compression.policies.expected_attention import ExpectedAttention
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.decode_worker.tiny import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape, random_attention
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

HALF = HEAD_DIM // 2
FREQUENCIES = 10000.0 ** (-np.arange(HALF) / HALF)


def rotated(vectors: np.ndarray, position: int) -> np.ndarray:
    """Vectors [.., head_dim], as pairs (i, i + half) that turn."""
    pairs = (vectors[..., :HALF] + 1j * vectors[..., HALF:]) * np.exp(1j * position * FREQUENCIES)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def naive_scores(queries: np.ndarray, key: np.ndarray, value: np.ndarray, sinks: int, future: int) -> np.ndarray:
    """One KV head: queries [group, tokens, head_dim] before rotation, keys rotated; infinite for sinks."""
    tokens = len(key)
    expected = np.zeros(tokens - sinks)
    # rotation is linear, so its mean is that of the rotated unit vectors
    turn = sum(rotated(np.eye(HEAD_DIM), position) for position in range(tokens, tokens + future)).T / future
    for head in queries:
        mean, covariance = turn @ head[sinks:].mean(axis=0), turn @ np.cov(head[sinks:].T, bias=True) @ turn.T
        logits = [k @ mean / HEAD_DIM**0.5 + k @ covariance @ k / (2 * HEAD_DIM) for k in key[sinks:]]
        weights = np.exp(np.array(logits) - max(logits))
        expected += weights / weights.sum() / len(queries)
    norms = np.linalg.norm(value[sinks:], axis=1)
    return np.concatenate([np.full(sinks, np.inf), expected * norms])


def unrotated_queries(whole: Any, prompt: Prompt) -> tuple[list[np.ndarray], DynamicCache]:
    seen: list[np.ndarray] = []
    cache = DynamicCache()
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, output: seen.append(output[0].double().numpy()))
        for layer in whole.get_decoder().layers
    ]
    with torch.inference_mode():
        whole(**prompt.inputs, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    return [queries.reshape(-1, QUERY_HEADS, HEAD_DIM).transpose(1, 0, 2) for queries in seen], cache


@pytest.mark.parametrize(("sinks", "future"), [(4, 512), (0, 16), (7, 1)])
@pytest.mark.parametrize("image", [True, False])
def test_on_a_model_it_is_the_naive_method(
    engine: PrefillEngine, whole: Any, builder: PromptBuilder, image: bool, sinks: int, future: int
) -> None:
    parts = (encoded(picture(1)), QUESTION) if image else (QUESTION * 3,)
    prompt = builder.build([user(*parts)], max_new_tokens=1)
    policy = ExpectedAttention(sinks=sinks, future=future)
    prefilled = engine.prefill(prompt, statistics_for(policy, prompt.shape), threading.Event())
    layers = prefilled.observed(prompt.shape)
    selections = select_tokens(policy, layers, Budget(retention=0.5))

    queries, cache = unrotated_queries(whole, prompt)
    assert len(layers) == len(queries) == LAYERS
    kept, group = prompt.shape.num_tokens // 2, QUERY_HEADS // KV_HEADS
    for layer, selection, query, cached in zip(layers, selections, queries, cache.layers, strict=True):
        for head in range(KV_HEADS):
            key, value = (tensor[0, head].double().numpy() for tensor in (cached.keys, cached.values))
            expected = naive_scores(query[head * group : (head + 1) * group], key, value, sinks, future)
            np.testing.assert_allclose(policy.score(layer)[head], expected, rtol=1e-3, atol=1e-7)
            assert positions(selection)[head] == sorted(np.argsort(-expected, kind="stable")[:kept])


def expected_shares(queries: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One KV head, two sinks: of the mean over its queries of the attention to each later key."""
    shares = np.zeros(len(key) - 2)
    for head in queries:
        logits = key[2:] @ head[2:].mean(axis=0) / 8**0.5
        logits = logits + np.einsum("ni,ij,nj->n", key[2:], np.cov(head[2:].T, bias=True), key[2:]) / 16
        shares += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() / len(queries)
    return shares


def test_a_model_that_rotates_nothing_expects_queries_as_they_are() -> None:
    policy = ExpectedAttention(sinks=2)
    layer = random_attention(prompt_shape(40), seed=1)
    turnless = expected_shares(layer.query[:2].double().numpy(), layer.key[0].double().numpy())
    norms = layer.value[0, 2:].double().norm(dim=-1).numpy()
    np.testing.assert_allclose(policy.score(observe(policy, layer))[0, 2:], turnless * norms, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_prompts_of_little_more_than_sinks_stay(tokens: int) -> None:
    policy = ExpectedAttention()
    scores = policy.score(observe(policy, random_attention(prompt_shape(tokens), seed=2)))
    assert not scores.isnan().any()
    assert scores[:, :4].isinf().all()


@pytest.mark.parametrize("parameters", [{"sinks": -1}, {"sinks": 17}, {"future": 0}, {"future": 4097}])
def test_bad_parameters_are_refused(parameters: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        ExpectedAttention(**parameters)
