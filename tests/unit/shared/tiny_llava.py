"""A random LLaVA with grouped KV heads that loads in milliseconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging

from models.shapes_vlm.paths import CHECKPOINT

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, SIDE, PATCH = 3, 4, 2, 8, 28, 14
EOS, OTHER_EOS = 2, 77


def config(vocabulary: int, image_token_id: int) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=QUERY_HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        eos_token_id=EOS,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
    )


def save_checkpoint(directory: Path) -> None:
    """Weights, processor of the bundled model at a smaller image size, and generation settings with two ends."""
    logging.disable_progress_bar()
    processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    torch.manual_seed(0)
    vocabulary = len(processor.tokenizer)
    model = LlavaForConditionalGeneration(config(vocabulary, processor.tokenizer.convert_tokens_to_ids("<image>")))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.2)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    GenerationConfig(eos_token_id=[EOS, OTHER_EOS]).save_pretrained(directory)


def copied(checkpoint: Path, to: Path) -> Path:
    return shutil.copytree(checkpoint, to / "copy")


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def edit_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = checkpoint / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


class PlainHook:
    """A `LayerHook` that attends causally and remembers with what it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[int, ...], tuple[int, ...], torch.Tensor | None, float]] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        assert key.shape == value.shape
        self.calls.append((layer, tuple(query.shape), tuple(key.shape), mask, scaling))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)
