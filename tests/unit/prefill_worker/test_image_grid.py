"""Which part of a picture a grid covers, against what real image processors leave of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from prefill_worker.preprocess.families import DEFAULT
from prefill_worker.preprocess.image_grid import ImageGrid, image_grids

SIZES = [(400, 400), (500, 300), (300, 420)]
PLAIN: dict[str, Any] = {"do_normalize": False, "resample": Image.Resampling.BILINEAR}
SHORT, SQUARE, NARROW = {"shortest_edge": 224}, {"height": 224, "width": 224}, {"height": 224, "width": 196}
PROCESSORS = {
    "cropped": CLIPImageProcessorPil(size=SHORT, crop_size=SQUARE, **PLAIN),
    "cropped more": CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size=NARROW, **PLAIN),
    "stretched": CLIPImageProcessorPil(size=SQUARE, do_center_crop=False, **PLAIN),
    "stretched and cropped": CLIPImageProcessorPil(size=SQUARE, crop_size=NARROW, **PLAIN),
    "padded": LlavaImageProcessorPil(do_pad=True, size=SHORT, crop_size=SQUARE, **PLAIN),
}


def grids(image_processor: Any, visual: np.ndarray, seen: np.ndarray, *sizes: tuple[int, int]) -> tuple[ImageGrid, ...]:
    processor = SimpleNamespace(patch_size=14, image_processor=image_processor)
    return image_grids(processor, DEFAULT, visual, {"pixel_values": seen}, sizes)


def slopes(width: int, height: int) -> Image.Image:
    """Red grows to the right and green to the bottom, blue everywhere."""
    across, down = np.linspace(20, 255, width), np.linspace(20, 255, height)
    planes = [np.tile(across, (height, 1)), np.tile(down[:, None], (1, width)), np.full((height, width), 255.0)]
    return Image.fromarray(np.stack(planes, axis=2).round().astype(np.uint8))


def share(value: float) -> float:
    return (value * 255 - 20) / 235


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_box_is_what_the_vision_tower_sees(kind: str, size: tuple[int, int]) -> None:
    seen = PROCESSORS[kind](slopes(*size), return_tensors="np")["pixel_values"]
    rows, columns = seen.shape[2] // 14, seen.shape[3] // 14
    (grid,) = grids(PROCESSORS[kind], np.ones(rows * columns, dtype=bool), seen, size)
    assert (grid.first_token, grid.rows, grid.columns) == (0, rows, columns)
    left, top, right, bottom = grid.box
    inside = np.argwhere(seen[0, 2] > 0.999)
    for plane, low, high in ((0, left, right), (1, top, bottom)):
        length = seen.shape[3 - plane]
        for place in (inside[0], inside[len(inside) // 2], inside[-1]):
            at = low + (high - low) * (float(place[1 - plane]) + 0.5) / length
            assert share(float(seen[0, plane, place[0], place[1]])) == pytest.approx(at, abs=0.02)


def test_each_image_has_its_place_and_a_class_token_comes_first() -> None:
    visual = np.zeros(30, dtype=bool)
    visual[3:8] = True
    visual[12:17] = True
    made = grids(PROCESSORS["cropped"], visual, np.zeros((2, 3, 28, 28)), (224, 224), (448, 224))
    assert [(grid.first_token, grid.rows, grid.columns) for grid in made] == [(4, 2, 2), (13, 2, 2)]
    assert [grid.box for grid in made] == [(0, 0, 1, 1), (0.25, 0, 0.75, 1)]
