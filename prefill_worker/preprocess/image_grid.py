"""Where the visual tokens of each image lie in a prompt, and which part of the picture they cover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vlcache.v1 import inference_pb2 as public

from prefill_worker.preprocess.families import Family
from prefill_worker.preprocess.image_counts import Size

WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """Visual tokens of one image: `rows` times `columns` from `first_token` on, row after row.

    `box` is what they cover: left, top, right, bottom in shares of the image's width and height; less than 0 to 1
    where it was cropped, more where it was padded. An image whose tokens are no such grid has no rows and columns.
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
    processor: Any,
    family: Family,
    visual: NDArray[np.bool_],
    inputs: Mapping[str, NDArray[Any]],
    sizes: Sequence[Size | None],
) -> tuple[ImageGrid, ...]:
    """The grids of a prompt's images.

    Args:
        visual: [num_tokens] bool.
        inputs: What the processor made.
        sizes: Of the images before the processor, upright; None in place of a video, which has no grid.
    """
    images = [size for size in sizes if size is not None]
    if not images:
        return ()
    if family.tiles:
        # views of different detail overlap, and markers stand between them: no rows and columns are right
        return (ImageGrid(first_token=0, rows=0, columns=0, box=WHOLE),) * len(images)
    places = np.flatnonzero(visual)
    if family.mrope:
        grids = _resized_grids(places, inputs["image_grid_thw"], processor.image_processor.merge_size)
        return tuple(grid for grid, size in zip(grids, sizes, strict=True) if size is not None)
    by_image = places.reshape(len(images), -1)
    rows, columns = _rows_and_columns(processor, by_image.shape[1], inputs["pixel_values"])
    # what the vision tower has beside patches, a class token, comes first
    firsts = (by_image[:, 0] + by_image.shape[1] - rows * columns).tolist()
    boxes = [_seen(processor.image_processor, size) for size in images]
    return tuple(
        ImageGrid(first_token=first, rows=rows, columns=columns, box=box)
        for first, box in zip(firsts, boxes, strict=True)
    )


def _resized_grids(places: NDArray[np.int64], patches: NDArray[np.int64], merged: int) -> tuple[ImageGrid, ...]:
    """Of images that are seen whole, at a resolution of their own; of a video, its first temporal patch."""
    grids, taken = list[ImageGrid](), 0
    for times, height, width in patches.tolist():
        rows, columns = height // merged, width // merged
        grids.append(ImageGrid(first_token=int(places[taken]), rows=rows, columns=columns, box=WHOLE))
        taken += times * rows * columns
    return tuple(grids)


def _rows_and_columns(processor: Any, tokens: int, pixel_values: NDArray[Any]) -> tuple[int, int]:
    """Patches of images of equal size, [num_images, channels, height, width], or what is pooled of them to a square."""
    patch = getattr(processor, "patch_size", None)
    if patch is None:
        return math.isqrt(tokens), math.isqrt(tokens)
    height, width = pixel_values.shape[-2:]
    return height // patch, width // patch


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
