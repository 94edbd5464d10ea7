"""A checkpoint as its users load it, and chats for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from shared.model.processor import load_processor

# Beside what a language model reads, these are what a processor makes of text.
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its processor; `loading` is transformers' report of missing and unexpected weights."""

    folder: Path
    processor: ProcessorMixin
    model: PreTrainedModel
    loading: dict[str, Any]

    def chat(self, images: Sequence[Image.Image] = (), question: str = "What is in the image?") -> dict[str, Any]:
        """Inputs of the model for a system message and a question about `images`."""
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
            {"role": "user", "content": parts},
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        # one list per conversation: some families show several images of one in less detail
        shown = [list(images)] if images else None
        return dict(self.processor(text=[text], images=shown, add_special_tokens=False, return_tensors="pt"))

    def features(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What the language model reads of the images, [num_visual_tokens, hidden]."""
        visual = {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
        features = self.model.get_image_features(**visual, return_dict=True).pooler_output
        return torch.cat([image.flatten(0, -2) for image in features])

    def answer(self, inputs: dict[str, Any], tokens: int = 8) -> list[int]:
        """Greedy tokens; no end of sequence among them."""
        made = self.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens)
        return made[0, inputs["input_ids"].shape[1] :].tolist()


def load(folder: Path) -> Loaded:
    logging.disable_progress_bar()
    model, loading = AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    return Loaded(folder=folder, processor=load_processor(folder), model=model.eval(), loading=loading)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image that resembles no other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
