"""What images become, by their sizes alone: a processor tells without looking at a pixel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from prefill_worker.preprocess.images import MAX_ASPECT, MAX_PIXELS, MIN_SIDE

Size = tuple[int, int]
"""Width and height in pixels."""

# Largest number of tiles along a side of which each is tried.
MAX_TILES = 8
# From one aspect ratio to the next one that is tried: less than a column of features.
ASPECT_STEP = 1.01
# Pixels of images that have a bound of their own: down to a few thousand, each half of the one before.
PIXELS = tuple(MAX_PIXELS >> halves for halves in reversed(range(14)))


class ImageBound(NamedTuple):
    """An image of at most so many pixels has at most so many visual tokens."""

    pixels: int
    visual_tokens: int


def image_views(processor: Any, sizes: Sequence[Size]) -> tuple[int, ...]:
    """How many rows of the processor's `pixel_values` each image has: tiles, or patches; often one.

    Args:
        sizes: Of the images before the processor, upright.
    """
    return tuple(_told(processor, sizes).num_image_patches)


def image_bounds(processor: Any) -> list[ImageBound]:
    """Ascending, the last one for all images; that alone, and exact, where all have equally many tokens."""
    sizes = list(_sizes(processor.image_processor))
    counts = _told(processor, sizes).num_image_tokens
    if min(counts) == max(counts):
        return [ImageBound(MAX_PIXELS, counts[0])]
    tried = list(zip((width * height for width, height in sizes), counts, strict=True))
    most = [max((count for pixels, count in tried if pixels <= limit), default=0) for limit in PIXELS]
    # between two sizes that were tried lie at most a row and a column
    bounds = [ImageBound(pixels, count + 2 * math.isqrt(count)) for pixels, count in zip(PIXELS, most, strict=True)]
    follow = [bound.visual_tokens for bound in bounds[1:]] + [0]
    return [bound for bound, next_tokens in zip(bounds, follow, strict=True) if bound.visual_tokens != next_tokens]


def _told(processor: Any, sizes: Sequence[Size]) -> Any:
    return processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])


def _sizes(image_processor: Any) -> Iterator[Size]:
    """All shapes, of as many pixels as have a bound and as large as some number of tiles."""
    tile = _tile_side(image_processor)
    for step in range(math.ceil(math.log(MAX_ASPECT, ASPECT_STEP)) + 1):
        aspect = min(ASPECT_STEP**step, MAX_ASPECT)
        shorts = {math.isqrt(int(pixels / aspect)) for pixels in PIXELS}
        largest = max(shorts)
        for short in shorts | {min(tile * count, largest) for count in range(1, MAX_TILES + 1)}:
            if short >= MIN_SIDE:
                yield from ((short, int(short * aspect)), (int(short * aspect), short))


def _tile_side(image_processor: Any) -> int:
    size = image_processor.size
    return size.get("height") or size.get("shortest_edge") or size["longest_edge"]
