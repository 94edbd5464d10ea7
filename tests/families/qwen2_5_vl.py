"""Qwen2.5-VL: as Qwen2-VL, with window attention in its tower."""

from __future__ import annotations

from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)

from shared.model.processor import images_only
from tests.families.family import WIDTH, Family, text_fields
from tests.families.qwen2_vl import IMAGE, MERGE, PATCH, ROPE, TEMPLATE, VOCABULARY, image_processor, token_ids


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": 2 * MERGE * PATCH,
        "fullatt_block_indexes": [1],
    }
    text = {**text_fields(tokenizer), "rope_parameters": ROPE}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **token_ids(tokenizer))


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return images_only(Qwen2_5_VLProcessor)(image_processor(PATCH), tokenizer, chat_template=template)


FAMILY = Family(
    name="qwen2_5_vl",
    image_token=IMAGE,
    vocabulary=VOCABULARY,
    template=TEMPLATE,
    build_config=build_config,
    build_processor=build_processor,
    mrope=True,
)
