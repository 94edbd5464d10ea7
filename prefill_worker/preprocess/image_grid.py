"""Where the visual tokens of each image lie in a prompt, and which part of the picture they cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vlcache.v1 import inference_pb2 as public

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """Visual tokens of one image: `rows` times `columns` from `first_token` on, row after row.

    `box` is what they cover: left, top, right, bottom in shares of the image's width and height; less than 0 to 1
    where it was cropped, more where it was padded.
    """

    first_token: int
    rows: int
    columns: int
    box: tuple[float, float, float, float]

    def to_proto(self) -> public.ImageGrid:
        """The grid on the wire."""
        left, top, right, bottom = self.box
        return public.ImageGrid(
            first_token=self.first_token,
            rows=self.rows,
            columns=self.columns,
            left=left,
            top=top,
            right=right,
            bottom=bottom,
        )


def image_grids(
    processor: Any, visual: NDArray[np.bool_], pixel_values: NDArray[Any], sizes: Sequence[Size]
) -> tuple[ImageGrid, ...]:
    """The grids of a prompt's images, all of which take equally many tokens.

    Args:
        visual: [num_tokens] bool.
        pixel_values: [num_images, channels, height, width], what the vision tower sees.
        sizes: Of the images before the processor, upright.
    """
    height, width = pixel_values.shape[-2:]
    rows, columns = height // processor.patch_size, width // processor.patch_size
    places = np.flatnonzero(visual).reshape(len(sizes), -1)
    # what the vision tower has beside patches, a class token, comes first
    firsts = (places[:, 0] + places.shape[1] - rows * columns).tolist()
    boxes = [_seen(processor.image_processor, size) for size in sizes]
    return tuple(
        ImageGrid(first_token=first, rows=rows, columns=columns, box=box)
        for first, box in zip(firsts, boxes, strict=True)
    )


def _seen(image_processor: Any, size: Size) -> tuple[float, float, float, float]:
    """What is left of an image when it was padded to a square, resized and cropped around its middle."""
    width, height = (max(size), max(size)) if getattr(image_processor, "do_pad", None) else size
    seen = (1.0, 1.0)
    if getattr(image_processor, "do_center_crop", None):
        crop, resized = image_processor.crop_size, _resized(image_processor.size, (width, height))
        seen = (crop["width"] / resized[0], crop["height"] / resized[1])
    across, down = (1 - seen[0] * width / size[0]) / 2, (1 - seen[1] * height / size[1]) / 2
    return (across, down, 1 - across, 1 - down)


def _resized(wanted: Any, size: Size) -> tuple[float, float]:
    short = wanted.get("shortest_edge")
    if short is None:
        return (wanted["width"], wanted["height"])
    return (size[0] * short / min(size), size[1] * short / min(size))
