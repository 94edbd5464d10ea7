"""Prompts with videos. transformers' processors refuse them without a video processor, see `video_patches.py`, so that
placeholders are expanded here, those of images in between as well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from prefill_worker.preprocess.clips import Clip
from prefill_worker.preprocess.families import VideoRule
from prefill_worker.preprocess.positions import Block
from prefill_worker.preprocess.processed import Array
from prefill_worker.preprocess.video_patches import Patches, PixelBounds, frames_size, video_patches
from shared.errors import InvalidRequestError

Visual = Image.Image | Clip
# The longest that is written before a temporal patch, and the markers around it.
TIMESTAMP_TOKENS = len("<3600.0 seconds>") + 2


class VideoInputs(NamedTuple):
    """What the model takes, and where the visual tokens lie in time and space."""

    inputs: dict[str, Array]
    blocks: list[Block]


class VideoPrompts:
    """Expands prompts with videos of one family. Thread-safe.

    Args:
        tokens_per_second: Temporal positions per second; None where they count temporal patches.
        max_tokens: Visual tokens of one video, at most.
    """

    def __init__(self, processor: Any, rule: VideoRule, *, tokens_per_second: float | None, max_tokens: int) -> None:
        self._processor = processor
        self._images = processor.image_processor
        self._rule = rule
        self._tokens_per_second = tokens_per_second
        self._max_tokens = max_tokens
        size = processor.video_processor.size or self._images.size
        self._bounds = PixelBounds(size["shortest_edge"], size["longest_edge"])

    def inputs(self, text: str, visuals: Sequence[Visual]) -> VideoInputs:
        """Expands a rendered prompt.

        Args:
            visuals: In the order of their placeholders.

        Raises:
            InvalidRequestError: A video cannot be decoded, or the template shows none.
        """
        patches = [self._patches(visual) for visual in visuals]
        shown = list(zip(visuals, patches, strict=True))
        expanded = self._expand(text, [self._placeholders(visual, made) for visual, made in shown])
        # the template writes the special tokens itself
        encoded = self._processor.tokenizer([expanded], add_special_tokens=False, return_tensors="np")
        inputs = {
            "input_ids": encoded["input_ids"],
            "pixel_values": np.concatenate([made.pixel_values for made in patches]),
            "image_grid_thw": np.array([made.grid for made in patches], np.int64),
        }
        return VideoInputs(inputs, [block for visual, made in shown for block in self._blocks(visual, made)])

    def marker_tokens(self, frames: int) -> int:
        """Upper bound of the text tokens within a video of so many frames."""
        return -(-frames // self._images.temporal_patch_size) * TIMESTAMP_TOKENS if self._rule.timestamps else 0

    def _patches(self, visual: Visual) -> Patches:
        if isinstance(visual, Image.Image):
            made = self._images(images=[visual], return_tensors="np")
            times, rows, columns = made["image_grid_thw"][0].tolist()
            return Patches(made["pixel_values"], (times, rows, columns))
        depth, token_side = self._images.temporal_patch_size, self._images.patch_size * self._images.merge_size
        frames = -(-len(visual.seconds) // depth) * depth
        size = frames_size(self._bounds, self._rule, frames, token_pixels=token_side**2, max_tokens=self._max_tokens)
        return video_patches(visual, self._images, size)

    def _expand(self, text: str, placeholders: Sequence[str]) -> str:
        image, video = self._processor.image_token, self._processor.video_token
        if self._rule.timestamps:
            # what the template writes around it comes around every temporal patch
            text = text.replace(self._framed(video), video)
        pieces = re.split(f"{re.escape(image)}|{re.escape(video)}", text)
        if len(pieces) != len(placeholders) + 1:
            raise InvalidRequestError("the model's chat template does not show all images and videos")
        return pieces[0] + "".join(map("".join, zip(placeholders, pieces[1:], strict=True)))

    def _placeholders(self, visual: Visual, made: Patches) -> str:
        times, rows, columns = self._tokens(made)
        if isinstance(visual, Image.Image):
            return self._processor.image_token * (rows * columns)
        video = self._processor.video_token * (rows * columns)
        if not self._rule.timestamps:
            return video * times
        return "".join(f"<{at:.1f} seconds>{self._framed(video)}" for at in self._shown_at(visual))

    def _framed(self, video: str) -> str:
        return f"{self._processor.vision_start_token}{video}{self._processor.vision_end_token}"

    def _blocks(self, visual: Visual, made: Patches) -> list[Block]:
        times, rows, columns = self._tokens(made)
        if isinstance(visual, Image.Image):
            return [Block((0,), rows, columns)]
        if self._rule.timestamps:
            return [Block((0,), rows, columns)] * times
        step = 1.0
        if self._tokens_per_second is not None:
            step = self._tokens_per_second * self._images.temporal_patch_size / visual.fps
        # in the precision that models compute it in
        at = (np.arange(times, dtype=np.float32) * np.float32(step)).astype(np.int64)
        return [Block(tuple(at.tolist()), rows, columns)]

    def _tokens(self, made: Patches) -> tuple[int, int, int]:
        times, height, width = made.grid
        return times, height // self._images.merge_size, width // self._images.merge_size

    def _shown_at(self, clip: Clip) -> list[float]:
        """The middle of each temporal patch, seconds."""
        depth = self._images.temporal_patch_size
        seconds = [*clip.seconds, *[clip.seconds[-1]] * (-len(clip.seconds) % depth)]
        return [(seconds[at] + seconds[at + depth - 1]) / 2 for at in range(0, len(seconds), depth)]
