"""Qwen3-VL: interleaved M-RoPE, and features of inner vision layers added to the first language layers."""

from __future__ import annotations

from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)

from shared.model.processor import images_only
from tests.families.family import HEAD_DIM, WIDTH, Family, text_fields
from tests.families.qwen2_vl import IMAGE, MERGE, ROPE, TEMPLATE, VOCABULARY, image_processor, token_ids

PATCH = 16


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**text_fields(tokenizer), "head_dim": HEAD_DIM, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **token_ids(tokenizer))


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return images_only(Qwen3VLProcessor)(image_processor(PATCH), tokenizer, chat_template=template)


FAMILY = Family(
    name="qwen3_vl",
    image_token=IMAGE,
    vocabulary=VOCABULARY,
    template=TEMPLATE,
    build_config=build_config,
    build_processor=build_processor,
    mrope=True,
)
