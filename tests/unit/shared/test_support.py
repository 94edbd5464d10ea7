"""Architectures that cannot be served are refused with the reason, before or right after their weights are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    Blip2Config,
    CLIPVisionConfig,
    DeepseekV3Config,
    Florence2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3nConfig,
    Gemma3TextConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    Llama4Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MllamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3NextConfig,
)
from transformers import logging as transformers_logging

from shared.kv.layout import KVLayout
from shared.model.attention import DECODE_ATTENTION
from shared.model.spec import VLMSpec
from shared.model.support import UnsupportedModelError, check_supported, layer_windows, model_class
from shared.model.trial import try_out


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers_logging.set_verbosity_error()


def llava(text: PretrainedConfig) -> LlavaConfig:
    return LlavaConfig(text_config=text, image_token_index=3)


def with_rope(rope: str) -> LlavaConfig:
    text = LlamaConfig()
    text.rope_parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    return llava(text)


def nested_rope() -> Gemma3Config:
    config = Gemma3Config()
    config.text_config.rope_parameters["full_attention"]["rope_type"] = "longrope"
    return config


def without_visual_token() -> LlavaConfig:
    config = llava(LlamaConfig())
    config.image_token_id = None
    return config


REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "an encoder-decoder": (Florence2Config, "encoder-decoder"),
    "a language model that is one": (lambda: llava(BartConfig()), "encoder-decoder"),
    "cross-attention": (MllamaConfig, "cross-attention"),
    "no visual token": (without_visual_token, "no visual token"),
    "a family without one": (Blip2Config, "no visual token"),
    "no attention backend": (lambda: llava(JambaConfig()), "JambaModel has no attention backend"),
    "linear layers": (lambda: llava(Qwen3NextConfig()), "Qwen3NextModel has no attention backend"),
    "a whole that has none": (Qwen3_5Config, "Qwen3_5ForConditionalGeneration has no attention backend"),
    "convolutions": (lambda: llava(Lfm2Config(full_attn_idxs=[1])), "layers of type 'conv'; its state"),
    "chunks": (Llama4Config, "layers of type 'chunked_attention'; the decode kernels"),
    "capped logits": (lambda: llava(Gemma2Config()), "attn_logit_softcapping"),
    "text in both directions": (
        lambda: Gemma3Config(text_config=Gemma3TextConfig(use_bidirectional_attention=True)),
        "use_bidirectional_attention",
    ),
    "latent KV": (lambda: llava(DeepseekV3Config()), "kv_lora_rank"),
    "shared KV": (Gemma3nConfig, "num_kv_shared_layers"),
    "frequencies that follow others": (lambda: with_rope("dynamic"), "'dynamic'"),
    "frequencies of one type of layer": (nested_rope, "'longrope'"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_computed_wrongly_is_refused(build: Callable[[], PretrainedConfig], reason: str) -> None:
    config = build()
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        check_supported(config)
    assert str(caught.value).startswith(f"{config.model_type} cannot be served: ")


@pytest.mark.parametrize("kind", ["linear_attention", "mamba", "recurrent", "conv", "something_new"])
def test_a_layer_that_keeps_something_else_is_refused_by_its_type(kind: str) -> None:
    text = LlamaConfig(num_hidden_layers=2)
    text.layer_types = ["full_attention", kind]
    with pytest.raises(UnsupportedModelError, match=f"layers of type '{kind}'"):
        check_supported(llava(text))


def test_what_transformers_does_not_call_a_vision_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'llama' is no vision-language model"):
        model_class(LlamaConfig())


def test_a_plain_family_passes() -> None:
    check_supported(llava(LlamaConfig()))
    check_supported(with_rope("linear"))
    check_supported(Gemma3Config())


def test_windows_are_those_of_the_layers() -> None:
    text = Gemma3TextConfig(num_hidden_layers=7, sliding_window=512, sliding_window_pattern=3)
    assert layer_windows(text) == (512, 512, 0, 512, 512, 0, 512)
    assert layer_windows(MistralConfig(num_hidden_layers=3, sliding_window=4096)) == (4096,) * 3
    mixed = Qwen2Config(num_hidden_layers=3, use_sliding_window=True, sliding_window=256, max_window_layers=2)
    assert layer_windows(mixed) == (0, 0, 256)


def test_a_window_that_hides_nothing_is_none() -> None:
    assert layer_windows(MistralConfig(sliding_window=None)) == ()
    assert layer_windows(MistralConfig(sliding_window=8192, max_position_embeddings=8192)) == ()
    switched_off = Qwen2Config(use_sliding_window=False)
    switched_off.sliding_window = 4096
    assert layer_windows(switched_off) == ()


def test_a_window_of_a_language_model_is_part_of_the_layout() -> None:
    text = MistralConfig(num_hidden_layers=2, sliding_window=64)
    spec = VLMSpec.from_config(llava(text), eos_token_ids=frozenset(), dtype=torch.float32)
    assert spec.layout.windows == (64, 64)
    assert KVLayout.from_proto(spec.layout.to_proto()) == spec.layout


def tiny(text: PretrainedConfig) -> Any:
    """A random LLaVA with that language model, as the decode worker runs it."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=14, patch_size=14
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    model = model_class(config)(config)
    model.set_attn_implementation({"text_config": DECODE_ATTENTION})
    return model.eval()


SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_attention_with_sinks_shows_with_the_first_token() -> None:
    text = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    model = tiny(text)
    layout = VLMSpec.from_config(model.config, eos_token_ids=frozenset(), dtype=torch.float32).layout
    with pytest.raises(UnsupportedModelError, match="llava cannot be served: attention with s_aux"):
        try_out(model, layout)


def test_the_first_token_says_whether_kv_has_the_promised_shape() -> None:
    model = tiny(LlamaConfig(**SIZES))
    promised = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
    try_out(model, promised)
    for wrong in ({"num_layers": 3}, {"num_kv_heads": 4}, {"head_dim": 16}):
        other = KVLayout(**{"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "dtype": "float32", **wrong})
        with pytest.raises(UnsupportedModelError, match="its layers attend as"):
            try_out(model, other)
