"""transformers calls the hook that the caller passed, layer by layer, and refuses what the hook does not compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from shared.model.attention import (
    DECODE_ATTENTION,
    HARMLESS_TERMS,
    PREFILL_ATTENTION,
    prompt_mask,
    vlcache_attention,
)
from tests.unit.shared.tiny_llava import PlainHook

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, TOKENS = 3, 6, 2, 8, 5
IDS = torch.arange(TOKENS)[None]


def model(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=QUERY_HEADS * HEAD_DIM,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", [PREFILL_ATTENTION, DECODE_ATTENTION])
@torch.inference_mode()
def test_the_hook_is_called_per_layer_in_order_with_grouped_heads(attention: str) -> None:
    hook = PlainHook()
    logits = model(attention)(input_ids=IDS, vlc=hook).logits
    assert [layer for layer, *_ in hook.calls] == list(range(LAYERS))
    for _, query, key, _, scaling in hook.calls:
        assert query == (1, QUERY_HEADS, TOKENS, HEAD_DIM)
        assert key == (1, KV_HEADS, TOKENS, HEAD_DIM)
        assert scaling == pytest.approx(HEAD_DIM**-0.5)
    torch.testing.assert_close(logits, model("eager")(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_two_passes_with_different_hooks_do_not_mix() -> None:
    shared, first, second = model(PREFILL_ATTENTION), PlainHook(), PlainHook()
    shared(input_ids=IDS, vlc=first)
    shared(input_ids=IDS[:, :2], vlc=second)
    assert {call[1][2] for call in first.calls} == {TOKENS}
    assert {call[1][2] for call in second.calls} == {2}


@torch.inference_mode()
def test_cached_keys_arrive_with_the_new_ones() -> None:
    cached, cache, hook = model(PREFILL_ATTENTION), DynamicCache(), PlainHook()
    cached(input_ids=IDS[:, :3], past_key_values=cache, vlc=PlainHook())
    positions = torch.arange(3, TOKENS)[None]
    cached(input_ids=IDS[:, 3:], past_key_values=cache, position_ids=positions, vlc=hook)
    assert {(query[2], key[2]) for _, query, key, _, _ in hook.calls} == {(TOKENS - 3, TOKENS)}


@pytest.mark.parametrize("attention", [PREFILL_ATTENTION, DECODE_ATTENTION])
@torch.inference_mode()
def test_without_a_hook_nothing_is_computed(attention: str) -> None:
    with pytest.raises(ValueError, match="LayerHook"):
        model(attention)(input_ids=IDS)


@torch.inference_mode()
def test_prefill_builds_a_mask_only_when_causal_attention_is_not_enough() -> None:
    plain, padded = PlainHook(), PlainHook()
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    model(PREFILL_ATTENTION)(input_ids=IDS, vlc=plain)
    model(PREFILL_ATTENTION)(input_ids=IDS, attention_mask=mask, vlc=padded)
    assert all(call[3] is None for call in plain.calls)
    for call in padded.calls:
        assert call[3] is not None
        assert call[3].shape[-2:] == (TOKENS, TOKENS)
        assert not call[3][..., -1, :2].any()


@torch.inference_mode()
def test_a_single_query_gets_no_mask_whatever_transformers_thinks() -> None:
    """A decode step over the prefill model; with `allow_is_causal_skip` off, as some versions do in a CUDA graph."""
    cached, cache, hook = model(PREFILL_ATTENTION), DynamicCache(), PlainHook()
    cached(input_ids=IDS[:, :-1], past_key_values=cache, vlc=PlainHook())
    cached(input_ids=IDS[:, -1:], past_key_values=cache, vlc=hook)
    assert [call[3] for call in hook.calls] == [None] * LAYERS
    sizes: dict[str, Any] = {"batch_size": 1, "kv_length": TOKENS, "q_offset": 0, "allow_is_causal_skip": False}
    assert prompt_mask(q_length=1, **sizes) is None
    assert prompt_mask(q_length=TOKENS, **sizes).shape == (1, 1, TOKENS, TOKENS)


@torch.inference_mode()
def test_decode_never_builds_a_mask() -> None:
    hook = PlainHook()
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    model(DECODE_ATTENTION)(input_ids=IDS, attention_mask=mask, vlc=hook)
    assert all(call[3] is None for call in hook.calls)


class Layer(torch.nn.Module):
    layer_idx = 4


def direct(**terms: Any) -> PlainHook:
    hook, tensor = PlainHook(), torch.zeros(1, 2, 3, 16)
    out, weights = vlcache_attention(Layer(), tensor, tensor, tensor, None, vlc=hook, **terms)
    assert out.shape == (1, 3, 2, 16)
    assert weights is None
    return hook


@pytest.mark.parametrize("term", ["softcap", "s_aux", "a_term_of_tomorrow"])
def test_terms_that_may_change_the_logits_are_refused_by_name(term: str) -> None:
    with pytest.raises(NotImplementedError, match=term):
        direct(**{term: 30.0})
    with pytest.raises(NotImplementedError, match=term):
        direct(**{term: torch.zeros(2)})
    assert direct(**{term: None}).calls


def test_harmless_terms_pass_and_the_scale_is_optional() -> None:
    assert direct(dropout=0.0, position_ids=None).calls[0][4] == 0.25
    assert direct(scaling=0.5).calls[0][4] == 0.5
    assert direct().calls[0][0] == 4
    assert all(direct(**{term: 1}).calls for term in HARMLESS_TERMS)


def test_dropout_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="dropout"):
        direct(dropout=0.1)
