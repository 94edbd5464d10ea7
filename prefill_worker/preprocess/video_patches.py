"""Frames as the vision towers of Qwen-VL take them, without torchvision.

transformers' video processors need it. What they do to a frame the image processor does as well, but it doubles each
one in time; here frames that follow each other are put together instead.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from prefill_worker.preprocess.clips import Clip
from prefill_worker.preprocess.families import VideoRule
from prefill_worker.preprocess.processed import Array


class Patches(NamedTuple):
    """One image or video as a vision tower takes it.

    Attributes:
        pixel_values: [times x height x width, values].
        grid: Times, height and width, in patches.
    """

    pixel_values: Array
    grid: tuple[int, int, int]


class PixelBounds(NamedTuple):
    """Of a frame, or of all frames of a video together, see `VideoRule`."""

    least: int
    most: int


def frames_size(
    bounds: PixelBounds, rule: VideoRule, frames: int, *, token_pixels: int, max_tokens: int
) -> dict[str, int]:
    """The size that the image processor is asked for: bounds of the pixels of each frame.

    Args:
        frames: Of the video, those that fill its last temporal patch included.
        token_pixels: What a token shows of each frame of its temporal patch.
        max_tokens: Of the whole video.
    """
    share = frames if rule.pixels_together else 1
    # two frames are shown by one token
    most = min(max(bounds.most // share, token_pixels), max_tokens * 2 // frames * token_pixels)
    # not 0, which a side could be rounded to; and rounding up may not pass the upper bound
    return {"shortest_edge": min(max(bounds.least // share, 1), most // 4), "longest_edge": most}


def video_patches(clip: Clip, image_processor: Any, size: dict[str, int]) -> Patches:
    """Raises as taking the clip's frames does."""
    depth = image_processor.temporal_patch_size
    slices = list[Array]()
    for frame in clip.frames:
        made = image_processor(images=[frame], size=size, return_tensors="np")
        (_, rows, columns), values = made["image_grid_thw"][0].tolist(), made["pixel_values"]
        # the same frame `depth` times within each patch: channel, time, place
        slices.append(values.reshape(rows * columns, 3, depth, -1)[:, :, 0].copy())
    slices += [slices[-1]] * (-len(slices) % depth)
    times = len(slices) // depth
    pixels = np.empty((times, rows * columns, 3, depth, slices[0].shape[-1]), slices[0].dtype)
    for at, values in enumerate(slices):
        pixels[at // depth, :, :, at % depth] = values
    return Patches(pixels.reshape(math.prod((times, rows, columns)), -1), (times, rows, columns))
