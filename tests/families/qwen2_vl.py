"""Qwen2-VL: images at their own resolution, positions in time, height and width (M-RoPE)."""

from __future__ import annotations

from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from shared.model.processor import images_only
from tests.families.chatml import END, START, chatml
from tests.families.family import WIDTH, Family, text_fields
from tests.families.vocabulary import Vocabulary

PATCH, MERGE = 14, 2
MAX_TOKENS = 16
IMAGE, VIDEO, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
TEMPLATE = chatml(VISION_START + IMAGE + VISION_END, VISION_START + VIDEO + VISION_END)
VOCABULARY = Vocabulary(
    bos=None,
    eos=END,
    pad="<|endoftext|>",
    named={
        "image_token": IMAGE,
        "video_token": VIDEO,
        "vision_start_token": VISION_START,
        "vision_end_token": VISION_END,
    },
    others=(START,),
)
# Pairs of channels that turn with time, height and width: together half of a head.
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Special tokens as the configurations of all Qwen-VL generations name them."""
    names = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def image_processor(patch: int) -> Qwen2VLImageProcessorPil:
    """At most `MAX_TOKENS` features per image, each of `MERGE` x `MERGE` patches."""
    area = (patch * MERGE) ** 2
    size = {"shortest_edge": area, "longest_edge": MAX_TOKENS * area}
    return Qwen2VLImageProcessorPil(size=size, patch_size=patch, merge_size=MERGE)


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    vision: dict[str, Any] = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    text = {**text_fields(tokenizer), "rope_parameters": ROPE}
    return Qwen2VLConfig(text_config=text, vision_config=vision, **token_ids(tokenizer))


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return images_only(Qwen2VLProcessor)(image_processor(PATCH), tokenizer, chat_template=template)


FAMILY = Family(
    name="qwen2_vl",
    image_token=IMAGE,
    vocabulary=VOCABULARY,
    template=TEMPLATE,
    build_config=build_config,
    build_processor=build_processor,
    mrope=True,
)
