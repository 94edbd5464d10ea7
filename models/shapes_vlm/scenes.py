"""Draws one scene: shapes and code plates on a noisy background, and says which patches hold what.

A scene has 12 x 12 cells of 28 px. A shape fills one cell (2 x 2 patches), a plate three cells in a row
(12 patches, one column of two patches per glyph). Shapes stand on different cell rows, and so do plates:
"from top to bottom" is unambiguous.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.shapes_vlm.stamps import CELL_PX, GLYPH_WIDTH_PX, SHAPE_KINDS, glyph_mask, shape_mask

IMAGE_PX = 336
PATCH_PX = 14
GRID_CELLS = IMAGE_PX // CELL_PX
GRID_PATCHES = IMAGE_PX // PATCH_PX
NUM_PATCHES = GRID_PATCHES**2

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (245, 130, 20),
    "yellow": (238, 216, 32),
    "green": (38, 150, 60),
    "cyan": (50, 200, 214),
    "blue": (34, 72, 200),
    "purple": (140, 50, 170),
    "black": (22, 22, 24),
}
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
GLYPHS = "ACDEFGHJKLMNPRTUVWXY34679"
"""Characters of a code; look-alikes (O/0, B/8, S/5, I/1, Z/2, Q) are left out."""
CODE_LENGTH = 6
PLATE_CELLS = 3
MAX_SHAPES = 10
MAX_PLATES = 4
MAX_SAME_COLOUR = 5
_LIGHT_PLATES = {"orange", "yellow", "cyan"}


def _patches(row: int, column: int, width_cells: int) -> tuple[int, ...]:
    """Patch indices (row * 24 + column) of `width_cells` cells starting at a cell, row by row."""
    top, left = 2 * row, 2 * column
    return tuple((top + i) * GRID_PATCHES + left + j for i in range(2) for j in range(2 * width_cells))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A coloured shape in the cell (`row`, `column`)."""

    kind: str
    colour: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def patches(self) -> tuple[int, ...]:
        return _patches(self.row, self.column, 1)


@dataclass(frozen=True, kw_only=True)
class Plate:
    """A coloured plate with a code; its left cell is (`row`, `column`)."""

    code: str
    colour: str
    row: int
    column: int

    @property
    def patches(self) -> tuple[int, ...]:
        return _patches(self.row, self.column, PLATE_CELLS)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is where, both from top to bottom, and the pixels: [336, 336, 3] uint8."""

    shapes: tuple[Shape, ...]
    plates: tuple[Plate, ...]
    pixels: NDArray[np.uint8]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    @property
    def used_patches(self) -> tuple[int, ...]:
        things: tuple[Shape | Plate, ...] = (*self.shapes, *self.plates)
        return tuple(sorted(patch for thing in things for patch in thing.patches))


def draw_scene(rng: np.random.Generator, *, num_shapes: int, num_plates: int) -> Scene:
    """A random scene with exactly so many shapes (<= 10, all different) and plates (<= 4, all colours differ)."""
    if not (0 <= num_shapes <= MAX_SHAPES and 0 <= num_plates <= MAX_PLATES):
        raise ValueError(f"at most {MAX_SHAPES} shapes and {MAX_PLATES} plates, got {num_shapes}, {num_plates}")
    plates = _place_plates(rng, num_plates)
    shapes = _place_shapes(rng, num_shapes, plates)
    canvas = _background(rng)
    for plate in plates:
        _paint_plate(rng, canvas, plate)
    for shape in shapes:
        _paint_shape(rng, canvas, shape)
    return Scene(shapes=shapes, plates=plates, pixels=np.clip(canvas, 0, 255).astype(np.uint8))


def draw_full_scene(rng: np.random.Generator) -> Scene:
    """A scene at the full difficulty: 3-10 shapes, 1-4 plates."""
    num_shapes, num_plates = int(rng.integers(3, MAX_SHAPES + 1)), int(rng.integers(1, MAX_PLATES + 1))
    return draw_scene(rng, num_shapes=num_shapes, num_plates=num_plates)


def _place_plates(rng: np.random.Generator, count: int) -> tuple[Plate, ...]:
    rows = np.sort(rng.permutation(GRID_CELLS)[:count])
    colours = rng.permutation(len(COLOUR_NAMES))
    return tuple(
        Plate(
            code="".join(GLYPHS[i] for i in rng.integers(len(GLYPHS), size=CODE_LENGTH)),
            colour=COLOUR_NAMES[colours[i]],
            row=int(row),
            column=int(rng.integers(GRID_CELLS - PLATE_CELLS + 1)),
        )
        for i, row in enumerate(rows)
    )


def _place_shapes(rng: np.random.Generator, count: int, plates: tuple[Plate, ...]) -> tuple[Shape, ...]:
    plate_columns = {plate.row: range(plate.column, plate.column + PLATE_CELLS) for plate in plates}
    rows = np.sort(rng.permutation(GRID_CELLS)[:count])
    shapes = []
    for (colour, kind), row in zip(_looks(rng, count), rows, strict=True):
        free = [c for c in range(GRID_CELLS) if c not in plate_columns.get(int(row), ())]
        column = free[int(rng.integers(len(free)))]
        shapes.append(Shape(kind=kind, colour=colour, row=int(row), column=column))
    return tuple(shapes)


def _looks(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Different (colour, kind) pairs; one colour is frequent, so that counts from 1 to 5 are about even."""
    if count == 0:
        return []
    same = int(rng.integers(1, min(MAX_SAME_COLOUR, count) + 1))
    frequent, *others = rng.permutation(len(COLOUR_NAMES))
    kinds = rng.permutation(len(SHAPE_KINDS))[:same]
    rest = [(c, k) for c in others for k in range(len(SHAPE_KINDS))]
    pairs = [(frequent, k) for k in kinds] + [rest[i] for i in rng.permutation(len(rest))[: count - same]]
    return [(COLOUR_NAMES[pairs[i][0]], SHAPE_KINDS[pairs[i][1]]) for i in rng.permutation(count)]


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    """A light tinted plane with a slope and grain: [336, 336, 3]."""
    base = rng.uniform(165, 228) + rng.uniform(-14, 14, size=3)
    slope_x, slope_y = rng.uniform(-12, 12, size=2)
    line = np.linspace(-1, 1, IMAGE_PX, dtype=np.float32)
    grain = rng.integers(-9, 10, size=(IMAGE_PX, IMAGE_PX), dtype=np.int8)
    plane = grain + slope_x * line[None, :] + slope_y * line[:, None]
    return np.asarray(plane[:, :, None] + base, dtype=np.float32)


def _blend(region: NDArray[np.float32], mask: NDArray[np.float32], ink: NDArray[np.float32]) -> None:
    region += mask[:, :, None] * (ink - region)


def _ink(rng: np.random.Generator, rgb: tuple[int, int, int]) -> NDArray[np.float32]:
    return np.asarray(np.array(rgb) + rng.uniform(-14, 14, size=3), dtype=np.float32)


def _paint_shape(rng: np.random.Generator, canvas: NDArray[np.float32], shape: Shape) -> None:
    mask = shape_mask(shape.kind, int(rng.integers(19, 25)), int(rng.integers(-2, 3)) * 5)
    # A roll by at most 2 px keeps the ink inside its own cell: the widest mask leaves a margin of 2 px.
    mask = np.roll(mask, tuple(rng.integers(-1, 2, size=2)), axis=(0, 1))
    top, left = shape.row * CELL_PX, shape.column * CELL_PX
    _blend(canvas[top : top + CELL_PX, left : left + CELL_PX], mask, _ink(rng, COLOURS[shape.colour]))


def _paint_plate(rng: np.random.Generator, canvas: NDArray[np.float32], plate: Plate) -> None:
    top, left = plate.row * CELL_PX, plate.column * CELL_PX
    canvas[top + 1 : top + CELL_PX - 1, left : left + PLATE_CELLS * CELL_PX] = _ink(rng, COLOURS[plate.colour])
    ink = _ink(rng, (30, 30, 30) if plate.colour in _LIGHT_PLATES else (235, 235, 235))
    size_px = int(rng.integers(17, 21))
    for slot, glyph in enumerate(plate.code):
        x, y = left + slot * GLYPH_WIDTH_PX, int(rng.integers(-1, 2))
        mask = np.roll(glyph_mask(glyph, size_px), y, axis=0)
        _blend(canvas[top : top + CELL_PX, x : x + GLYPH_WIDTH_PX], mask, ink)
