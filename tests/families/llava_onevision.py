"""LLaVA-OneVision: a SigLIP tower, tiles for a single image and one view each for several, Qwen2."""

from __future__ import annotations

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from shared.model.processor import images_only
from tests.families.chatml import END, START, chatml
from tests.families.family import Family, text_fields
from tests.families.vocabulary import Vocabulary

SIDE, PATCH = 28, 14
IMAGE, VIDEO = "<image>", "<video>"
RESOLUTIONS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(
        text_config=Qwen2Config(**text_fields(tokenizer)),
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=RESOLUTIONS,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return images_only(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=RESOLUTIONS),
        tokenizer,
        chat_template=template,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )


FAMILY = Family(
    name="llava_onevision",
    image_token=IMAGE,
    vocabulary=Vocabulary(
        bos=None,
        eos=END,
        pad="<|endoftext|>",
        named={"image_token": IMAGE, "video_token": VIDEO},
        others=(START,),
    ),
    template=chatml(IMAGE + "\n"),
    build_config=build_config,
    build_processor=build_processor,
    tiles=True,
)
