"""What images become, by their sizes alone: a processor tells without looking at a pixel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from prefill_worker.preprocess.images import MAX_ASPECT, MAX_PIXELS

Size = tuple[int, int]
"""Width and height in pixels."""

# Largest number of tiles along a side of which each is tried.
MAX_TILES = 8
# From one aspect ratio to the next one that is tried: a column of features of the widest image that has tiles.
ASPECT_STEP = 1.005


def image_views(processor: Any, sizes: Sequence[Size]) -> tuple[int, ...]:
    """How many rows of the processor's `pixel_values` each image has: tiles, or patches; often one.

    Args:
        sizes: Of the images before the processor, upright.
    """
    return tuple(_told(processor, sizes).num_image_patches)


def most_image_tokens(processor: Any) -> int:
    """Upper bound of the visual tokens of one image, whatever its size; exact where all have equally many."""
    counts = _told(processor, list(_sizes(processor.image_processor))).num_image_tokens
    least, most = min(counts), max(counts)
    # between two sizes that were tried lie at most a row and a column
    return most if least == most else most + 2 * math.isqrt(most)


def _told(processor: Any, sizes: Sequence[Size]) -> Any:
    return processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])


def _sizes(image_processor: Any) -> Iterator[Size]:
    """All shapes, as large as they may be and as large as some number of tiles."""
    tile = _tile_side(image_processor)
    for step in range(math.ceil(math.log(MAX_ASPECT, ASPECT_STEP)) + 1):
        aspect = min(ASPECT_STEP**step, MAX_ASPECT)
        largest = math.isqrt(int(MAX_PIXELS / aspect))
        for short in {largest, *(min(tile * count, largest) for count in range(1, MAX_TILES + 1))}:
            long = int(short * aspect)
            yield from ((short, long), (long, short))


def _tile_side(image_processor: Any) -> int:
    size = image_processor.size
    return size.get("height") or size.get("shortest_edge") or size["longest_edge"]
