"""SmolVLM: Idefics3 for small models, with a video processor beside its image processor."""

from __future__ import annotations

from transformers import (
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMProcessor,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from shared.model.processor import images_only
from tests.families.family import Family, text_fields
from tests.families.idefics3 import IMAGE, SHUFFLE, TEMPLATE, TILE_TOKENS, VOCABULARY, tile_sizes, tower


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return SmolVLMConfig(
        text_config=LlamaConfig(**text_fields(tokenizer)),
        vision_config=tower(),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=SHUFFLE,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    images = SmolVLMImageProcessorPil(**tile_sizes())
    return images_only(SmolVLMProcessor)(images, tokenizer, None, image_seq_len=TILE_TOKENS, chat_template=template)


FAMILY = Family(
    name="smolvlm",
    image_token=IMAGE,
    vocabulary=VOCABULARY,
    template=TEMPLATE,
    build_config=build_config,
    build_processor=build_processor,
    tiles=True,
)
