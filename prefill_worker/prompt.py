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
from prefill_worker.preprocess.video_limits import MAX_VIDEO_FRAMES, MAX_VIDEO_TOKENS
from shared.model.spec import VLMSpec

ProcessedImage = dict[str, torch.Tensor]
"""What the image processor made of one image."""

# Of `pixel_values` where images may have several views.
PADDED_DIMENSIONS = 5


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model sees of one request.

    Attributes:
        inputs: input_ids [1, num_tokens] and, with images, what the image processor made.
        position_ids: Rotary positions, [1, num_tokens], or [4, 1, num_tokens] where a token has one in time, height and
            width: its place comes first. Always explicit, a model must not remember the previous request's.
        next_position: RoPE position of the first generated token.
        pixels: Pixels of each image as sent, without videos.
        views: Rows of each image or video in `pixel_values`.
        grids: Where the visual tokens of each image lie.
        tenant: Whose images they are: what is kept of them is used for nobody else.
    """

    inputs: dict[str, torch.Tensor]
    position_ids: torch.Tensor
    next_position: int
    shape: PromptShape
    pixels: tuple[int, ...]
    views: tuple[int, ...] = ()
    grids: tuple[ImageGrid, ...] = ()
    tenant: str = ""

    @classmethod
    def of(cls, processed: ProcessedPrompt, *, spec: VLMSpec, tenant: str = "") -> Prompt:
        """The tensors of a preprocessed request; they share its memory."""
        inputs = {name: torch.from_numpy(array) for name, array in processed.inputs.items()}
        positions = torch.from_numpy(processed.positions)
        return cls(
            inputs=inputs,
            position_ids=_with_places(positions) if len(positions) > 1 else positions,
            next_position=int(positions.max()) + 1,
            shape=PromptShape(
                visual=torch.isin(inputs["input_ids"][0], torch.tensor(spec.visual_token_ids)),
                special=processed.special,
                punctuation=processed.punctuation,
                seed=processed.seed,
            ),
            pixels=processed.pixels,
            views=processed.views,
            grids=processed.grids,
            tenant=tenant,
        )

    @property
    def rotary_positions(self) -> torch.Tensor:
        """[num_tokens], or [3, num_tokens]: what queries and keys are rotated by."""
        return self.position_ids[0] if self.position_ids.dim() == 2 else self.position_ids[1:, 0]

    @property
    def images(self) -> list[ProcessedImage]:
        """Image by image what `inputs` has of them together."""
        made = {name: tensor for name, tensor in self.inputs.items() if name != "input_ids"}
        return [
            {name: _without_padding(_of_image(tensor, self.views, index)) for name, tensor in made.items()}
            for index in range(len(self.views))
        ]


def _with_places(positions: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.arange(positions.shape[1])[None], positions))[:, None]


def _of_image(tensor: torch.Tensor, views: Sequence[int], index: int) -> torch.Tensor:
    """Its views, in a dimension of their own or not, its row, or all of what is said of the images together."""
    rows = slice(sum(views[:index]), sum(views[: index + 1]))
    if len(tensor) == sum(views):
        return tensor[rows]
    if tensor.shape[:2] == (1, sum(views)):
        return tensor[:, rows]
    return tensor[index : index + 1] if len(tensor) == len(views) else tensor


def _without_padding(tensor: torch.Tensor) -> torch.Tensor:
    """Without empty views behind the last one, of [1, views, channels, height, width].

    With them a processor gives each image of a prompt as many as the largest has. What is no padding is normalised,
    which leaves no pixel at exactly 0.
    """
    if tensor.dim() != PADDED_DIMENSIONS:
        return tensor
    filled = tensor[0].flatten(1).any(dim=1).nonzero()
    return tensor[:, : int(filled[-1]) + 1] if len(filled) else tensor


class PromptBuilder:
    """Turns messages into a `Prompt`, in the process that it is called in. Thread-safe.

    Args:
        most: See `prompt_limits`.
    """

    def __init__(self, processor: Any, spec: VLMSpec, **most: int) -> None:
        self._spec = spec
        self.processing = PromptProcessor(processor, prompt_limits(spec, **most))

    def build(self, messages: Sequence[pb.Message], *, max_new_tokens: int, tenant: str = "") -> Prompt:
        """Checks and tokenises a conversation; raises as `PromptProcessor.process`."""
        processed = self.processing.process(messages, max_new_tokens=max_new_tokens)
        return Prompt.of(processed, spec=self._spec, tenant=tenant)


def prompt_limits(
    spec: VLMSpec,
    *,
    max_images: int,
    max_video_frames: int = MAX_VIDEO_FRAMES,
    max_video_tokens: int = MAX_VIDEO_TOKENS,
) -> PromptLimits:
    """What preprocessing must know of a model."""
    return PromptLimits(
        model_type=spec.model_type,
        image_token_id=spec.image_token_id,
        context_tokens=spec.context_tokens,
        max_images=max_images,
        video_token_id=spec.video_token_id,
        tokens_per_second=spec.tokens_per_second,
        max_video_frames=max_video_frames,
        max_video_tokens=max_video_tokens,
    )
