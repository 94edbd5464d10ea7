"""InternVL: tiles and a thumbnail in one span, features shuffled four to one, Qwen2 with tied embeddings."""

from __future__ import annotations

from transformers import (
    InternVLConfig,
    InternVLProcessor,
    InternVLVisionConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from shared.model.processor import images_only
from tests.families.chatml import END, START, chatml
from tests.families.family import Family, text_fields
from tests.families.vocabulary import Vocabulary

SIDE, PATCH, SHUFFLE = 28, 7, 2
TILE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
MAX_TILES = 4
IMAGE, VIDEO = "<IMG_CONTEXT>", "<video>"


def build_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    vision = InternVLVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
    )
    return InternVLConfig(
        text_config=Qwen2Config(tie_word_embeddings=True, **text_fields(tokenizer)),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=TILE_TOKENS,
        downsample_ratio=1 / SHUFFLE,
        tie_word_embeddings=True,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return images_only(InternVLProcessor)(
        GotOcr2ImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=MAX_TILES
        ),
        tokenizer,
        image_seq_length=TILE_TOKENS,
        chat_template=template,
    )


FAMILY = Family(
    name="internvl",
    image_token=IMAGE,
    vocabulary=Vocabulary(
        bos=None,
        eos=END,
        pad="<|endoftext|>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": IMAGE,
            "video_token": VIDEO,
        },
        others=(START,),
    ),
    template=chatml(IMAGE + "\n"),
    build_config=build_config,
    build_processor=build_processor,
    tiles=True,
)
