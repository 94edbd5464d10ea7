"""A prompt of more than 32,000 tokens with several images, from a prefill in pieces to tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from shared.model.loading import load_decode_model
from shared.model.processor import images_only
from tests.families import qwen2_vl
from tests.families.chats import QUESTION, Chat, inputs_of
from tests.families.loaded import load, noise
from tests.families.prefilling import CPU, Prefilling
from tests.families.test_prefill_to_decode import Decoding
from tests.unit.decode_worker.sequences import advance
from tests.unit.decode_worker.test_engine import Recorded

TOKENS, CHUNK, STEPS = 32_768, 4096, 3
# Small, as attention grows with the square of the prompt.
SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 65_536,
    "rope_parameters": {**qwen2_vl.ROPE, "mrope_section": [8, 4, 4]},
}
IMAGES, SIDE = 4, 420
PAGE = "Zebras quiz my jovial fox. " * 296


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    config: Any = qwen2_vl.build_config(tokenizer)
    for name, value in SMALL.items():
        setattr(config.text_config, name, value)
    config.text_config.layer_types = config.text_config.layer_types[:2]
    return config


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    size = {"shortest_edge": 28 * 28, "longest_edge": SIDE * SIDE}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=qwen2_vl.PATCH, merge_size=qwen2_vl.MERGE)
    return images_only(Qwen2VLProcessor)(images, tokenizer, chat_template=template)


LONG = dataclasses.replace(qwen2_vl.FAMILY, build_config=build_config, build_processor=build_processor)


def test_a_long_prompt_of_several_images_is_compressed_and_answered(tmp_path: Path) -> None:
    LONG.save(tmp_path)
    loaded = load(tmp_path)
    prefilling = Prefilling(loaded)
    prefilling.engine = prefilling.cutting(CHUNK)
    chat: Chat = [("user", [part for seed in range(IMAGES) for part in (noise(SIDE, SIDE, seed), PAGE)])]
    chat[0][1].append(QUESTION)
    decoder = Recorded(load_decode_model(tmp_path, dtype=torch.float32, device=CPU))
    decoding = Decoding(prefilling, decoder)
    prompt, manifest, sequence = decoding.bring(chat, 0.1)
    assert prompt.shape.num_tokens > TOKENS
    assert prompt.shape.num_visual == IMAGES * (SIDE // 28) ** 2
    assert 0.09 < manifest.realised_retention <= 0.1
    assert sequence.last_token == first_token(loaded.model, inputs_of(loaded, chat))
    for _ in range(STEPS):
        advance([sequence], decoding.engine.step([sequence]))
        assert bool(torch.isfinite(decoder.logits).all())


@torch.inference_mode()
def first_token(model: Any, inputs: dict[str, Any]) -> int:
    return int(model(**inputs, logits_to_keep=1).logits[0, -1].argmax())
