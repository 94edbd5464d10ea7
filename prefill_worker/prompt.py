"""A prompt as the model takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.preprocess.image_grid import ImageGrid
from prefill_worker.preprocess.processed import ProcessedPrompt
from prefill_worker.preprocess.processing import PromptLimits, PromptProcessor
from shared.model.spec import VLMSpec

ProcessedImage = dict[str, torch.Tensor]
"""What the image processor made of one image; every first dimension is 1."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model sees of one request.

    Attributes:
        inputs: input_ids [1, num_tokens] and, with images, what the image processor made.
        position_ids: [1, num_tokens]; always explicit, a model must not remember the previous request's.
        next_position: RoPE position of the first generated token.
        pixels: Pixels of each image as sent.
        grids: Where the visual tokens of each image lie.
        tenant: Whose images they are: what is kept of them is used for nobody else.
    """

    inputs: dict[str, torch.Tensor]
    position_ids: torch.Tensor
    next_position: int
    shape: PromptShape
    pixels: tuple[int, ...]
    grids: tuple[ImageGrid, ...] = ()
    tenant: str = ""

    @classmethod
    def of(cls, processed: ProcessedPrompt, *, image_token_id: int, tenant: str = "") -> Prompt:
        """The tensors of a preprocessed request; they share its memory."""
        inputs = {name: torch.from_numpy(array) for name, array in processed.inputs.items()}
        num_tokens = len(processed.input_ids)
        return cls(
            inputs=inputs,
            position_ids=torch.arange(num_tokens)[None],
            next_position=num_tokens,
            shape=PromptShape(
                visual=inputs["input_ids"][0] == image_token_id,
                special=processed.special,
                punctuation=processed.punctuation,
                seed=processed.seed,
            ),
            pixels=processed.pixels,
            grids=processed.grids,
            tenant=tenant,
        )

    @property
    def images(self) -> list[ProcessedImage]:
        """Image by image what `inputs` has of them together."""
        if "pixel_values" not in self.inputs:
            return []
        made = {name: tensor for name, tensor in self.inputs.items() if name != "input_ids"}
        count = len(made["pixel_values"])
        return [{name: tensor[at : at + 1] for name, tensor in made.items()} for at in range(count)]


class PromptBuilder:
    """Turns messages into a `Prompt`, in the process that it is called in. Thread-safe."""

    def __init__(self, processor: Any, spec: VLMSpec, *, max_images: int) -> None:
        self._spec = spec
        self.processing = PromptProcessor(processor, prompt_limits(spec, max_images=max_images))

    def build(self, messages: Sequence[pb.Message], *, max_new_tokens: int, tenant: str = "") -> Prompt:
        """Checks and tokenises a conversation; raises as `PromptProcessor.process`."""
        processed = self.processing.process(messages, max_new_tokens=max_new_tokens)
        return Prompt.of(processed, image_token_id=self._spec.image_token_id, tenant=tenant)


def prompt_limits(spec: VLMSpec, *, max_images: int) -> PromptLimits:
    """What preprocessing must know of a model."""
    return PromptLimits(
        image_token_id=spec.image_token_id,
        image_side=spec.image_side,
        context_tokens=spec.context_tokens,
        max_images=max_images,
    )
