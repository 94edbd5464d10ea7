"""A request as tokens and pixels: what preprocessing hands on. No torch here, so that its processes stay small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_worker.preprocess.image_grid import ImageGrid
from prefill_worker.preprocess.positions import Positions
from shared.kv.manifest import MAX_LOGICAL_LENGTH

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProcessedPrompt:
    """One unpadded prompt.

    Attributes:
        inputs: input_ids [1, num_tokens] int64 and, with images, what the image processor made.
        special: Positions of special tokens that do not stand for images, ascending.
        punctuation: Positions of tokens that are punctuation and nothing else, ascending.
        seed: Hash of `inputs`.
        pixels: Pixels of each image as sent, without videos.
        positions: Rotary positions, [axes, num_tokens] int64; axes are 1, or 3 for time, height and width.
        views: Rows of each image or video in `pixel_values`, one or more.
        grids: Where the visual tokens of each image lie.
    """

    inputs: dict[str, Array]
    special: tuple[int, ...]
    punctuation: tuple[int, ...]
    seed: int
    pixels: tuple[int, ...]
    positions: Positions
    views: tuple[int, ...] = ()
    grids: tuple[ImageGrid, ...] = ()

    def check(self, *, vocabulary: int) -> None:
        """Checks what indexes something: another process made this, with a stranger's bytes in its codecs.

        Raises:
            ValueError: There is no such token or place.
        """
        ids = self.inputs["input_ids"]
        if ids.dtype != np.int64 or ids.ndim != 2 or len(ids) != 1 or ids.min(initial=0) < 0 or ids.max() >= vocabulary:
            raise ValueError("these are no tokens")
        for places in (self.special, self.punctuation):
            if places and not (min(places) >= 0 and max(places) < ids.size):
                raise ValueError("a place outside of the prompt")
        self._check_positions(ids.size)
        self._check_views()

    def _check_positions(self, num_tokens: int) -> None:
        positions = self.positions
        if positions.dtype != np.int64 or positions.shape not in ((1, num_tokens), (3, num_tokens)):
            raise ValueError("these are no positions")
        # a video may last longer than it has tokens
        limit = num_tokens if len(positions) == 1 else MAX_LOGICAL_LENGTH
        if positions.min() < 0 or positions.max() >= limit:
            raise ValueError("a position outside of the prompt")

    def _check_views(self) -> None:
        if any(count < 1 for count in self.views):
            raise ValueError("an image of nothing")
        grids = self.inputs.get("image_grid_thw")
        if grids is None:
            return
        # the vision tower makes tables as large as they say
        fits = grids.dtype == np.int64 and grids.shape == (len(self.views), 3) and grids.min(initial=1) >= 1
        if not fits or [math.prod(grid) for grid in grids.tolist()] != list(self.views):
            raise ValueError("grids that are not those of the images")

    @property
    def input_ids(self) -> NDArray[np.int64]:
        """[num_tokens]."""
        return self.inputs["input_ids"][0]
