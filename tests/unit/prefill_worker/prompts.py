"""Prompts of the tiny model, with and without images."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.prompt import Prompt

QUESTION = "How many red circles are there in the image? Answer with one number."


def picture(seed: int, size: tuple[int, int] = (28, 28)) -> Image.Image:
    """Different noise for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def user(*parts: str | bytes) -> pb.Message:
    """A message of texts and encoded images."""
    return message("user", *parts)


def message(role: str, *parts: str | bytes) -> pb.Message:
    made = [pb.Part(text=part) if isinstance(part, str) else pb.Part(image=pb.Image(data=part)) for part in parts]
    return pb.Message(role=role, parts=made)


def raw_prompt(input_ids: list[int], shape: PromptShape, **inputs: torch.Tensor) -> Prompt:
    """A prompt that no chat template made."""
    return Prompt(
        inputs={"input_ids": torch.tensor([input_ids]), **inputs},
        position_ids=torch.arange(len(input_ids))[None],
        next_position=len(input_ids),
        shape=shape,
        pixels=(),
        views=(1,) * len(inputs.get("pixel_values", ())),
    )
