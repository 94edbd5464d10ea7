"""The full-attention pass: the same numbers as transformers, nothing left over, and an end when asked."""

import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from prefill_worker.compression.pipeline import statistics_for
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import RequestCancelledError
from tests.unit.decode_worker.tiny import HEAD_DIM, KV_HEADS, LAYERS
from tests.unit.prefill_worker.prompts import QUESTION, encoded, message, picture, user

POLICY = VLCache()


def with_image(builder: PromptBuilder) -> Prompt:
    return builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=1)


def text_only(builder: PromptBuilder) -> Prompt:
    turns = [message("system", "Be brief."), user("Hello?"), message("assistant", "Yes."), user(QUESTION)]
    return builder.build(turns, max_new_tokens=1)


def observed(engine: PrefillEngine, prompt: Prompt) -> Prefilled:
    return engine.prefill(prompt, statistics_for(POLICY, prompt.shape), threading.Event())


PROMPTS = pytest.mark.parametrize("make", [with_image, text_only])


@PROMPTS
@pytest.mark.parametrize("policy", [POLICY, None])
def test_logits_and_kv_are_those_of_transformers(
    engine: PrefillEngine, whole: Any, builder: PromptBuilder, make: Any, policy: VLCache | None
) -> None:
    prompt, cache = make(builder), DynamicCache()
    prefilled = engine.prefill(prompt, statistics_for(policy, prompt.shape) if policy else (), threading.Event())
    with torch.inference_mode():
        output = whole(**prompt.inputs, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(prefilled.logits, output.logits[0, -1], rtol=2e-4, atol=2e-4)
    assert len(prefilled.keys) == len(prefilled.values) == LAYERS
    for layer, keys, values in zip(cache.layers, prefilled.keys, prefilled.values, strict=True):
        assert keys.shape == (KV_HEADS, prompt.shape.num_tokens, HEAD_DIM)
        torch.testing.assert_close(keys, layer.keys[0], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(values, layer.values[0], rtol=2e-4, atol=2e-4)


def test_a_request_is_not_affected_by_the_one_before(engine: PrefillEngine, builder: PromptBuilder) -> None:
    alone, _, after = (observed(engine, make(builder)) for make in (text_only, with_image, text_only))
    assert torch.equal(alone.logits, after.logits)
    (sweep,) = POLICY.needs(text_only(builder).shape)
    for first, second in zip(alone.measured, after.measured, strict=True):
        assert torch.equal(first[sweep].column_sums, second[sweep].column_sums)
        assert torch.equal(first[sweep].counts, second[sweep].counts)


def test_two_images_are_told_apart(engine: PrefillEngine, builder: PromptBuilder) -> None:
    prompts = [builder.build([user(encoded(picture(seed)), QUESTION)], max_new_tokens=1) for seed in (1, 2)]
    first, second = (observed(engine, prompt).logits for prompt in prompts)
    assert not torch.allclose(first, second, atol=1e-2)


def test_without_a_policy_nothing_is_observed(engine: PrefillEngine, builder: PromptBuilder) -> None:
    prefilled = engine.prefill(with_image(builder), (), threading.Event())
    assert prefilled.measured == []
    assert prefilled.seconds["statistics"] == 0


def test_every_stage_has_a_duration(engine: PrefillEngine, builder: PromptBuilder) -> None:
    seconds = observed(engine, with_image(builder)).seconds
    assert {name for name, value in seconds.items() if value > 0} == {"vision_encode", "prefill", "statistics"}


def layers_before(engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch, cancel_at: int) -> threading.Event:
    """Sets the flag while layer `cancel_at` attends."""
    cancelled, attend = threading.Event(), torch.nn.functional.scaled_dot_product_attention
    seen: list[int] = []

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        if options.get("enable_gqa"):  # the language model's, not the vision tower's
            seen.append(len(seen))
            if seen[-1] == cancel_at:
                cancelled.set()
            assert len(seen) <= cancel_at + 1, "a layer ran after the cancellation"
        return attend(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return cancelled


@pytest.mark.parametrize("layer", range(LAYERS - 1))
def test_a_cancelled_pass_ends_before_the_next_layer(
    engine: PrefillEngine, builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    cancelled = layers_before(engine, monkeypatch, cancel_at=layer)
    with pytest.raises(RequestCancelledError, match=f"before layer {layer + 1}"):
        engine.prefill(with_image(builder), (), cancelled)


def test_a_pass_cancelled_in_the_queue_does_not_even_look_at_the_image(
    engine: PrefillEngine, builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine._model.model.vision_tower), "forward", lambda *_, **__: pytest.fail("encoded"))
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(RequestCancelledError):
        engine.prefill(with_image(builder), (), cancelled)
