"""A random LLaVA that is small enough for tests, with grouped heads and attention that is not flat."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.processor import CHAT_TEMPLATE, IMAGE

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 8
CONTEXT = 512
IMAGE_SIDE, PATCH = 28, 7
VISUAL_TOKENS = (IMAGE_SIDE // PATCH) ** 2


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def processor(chat_template: str = CHAT_TEMPLATE) -> LlavaProcessor:
    """With the bundled model's tokenizer and template, and few visual tokens."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def config() -> LlavaConfig:
    eos = tokenizer().eos_token_id
    text = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=QUERY_HEADS * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=eos,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer().convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
        eos_token_id=eos,
    )


def save_checkpoint(path: Path) -> Path:
    """Weights of about unit gain; attention is the sharper the deeper the layer, so that layers differ in sparsity."""
    torch.manual_seed(8)
    model = LlavaForConditionalGeneration(config()).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            layer = re.search(r"layers\.(\d)\.self_attn\.[qk]_proj", name)
            gain = 1.0 + int(layer[1]) if layer else 1.3
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else gain * parameter.shape[1] ** -0.5)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer().eos_token_id, do_sample=False)
    model.save_pretrained(path)
    processor().save_pretrained(path)
    return path


def load_whole(path: Path, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """The checkpoint as transformers alone runs it: the reference."""
    return LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()
