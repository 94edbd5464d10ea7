"""Anti-aliased masks of shapes and glyphs, drawn once by Pillow and cached.

A mask is the ink coverage in [0, 1] per pixel, float32: [28, 28] for a shape, [28, 14] for a glyph.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL_PX = 28
GLYPH_WIDTH_PX = CELL_PX // 2
SUPERSAMPLING = 8

Mask = NDArray[np.float32]
Point = tuple[float, float]


def _polygon(points: list[Point]) -> Callable[[ImageDraw.ImageDraw, Callable[[Point], Point]], None]:
    def draw(canvas: ImageDraw.ImageDraw, place: Callable[[Point], Point]) -> None:
        canvas.polygon([place(point) for point in points], fill=255)

    return draw


def _regular(corners: int, inner: float = 1.0) -> list[Point]:
    """Corner points on the unit circle, first one on top; `inner` < 1 makes a star."""
    steps = corners if inner == 1.0 else 2 * corners
    radii = [1.0 if inner == 1.0 or i % 2 == 0 else inner for i in range(steps)]
    angles = [2 * math.pi * i / steps - math.pi / 2 for i in range(steps)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _ring(outer: float, hole: float) -> list[Point]:
    """Outer circle and inner circle as one self-touching outline."""
    turn = [2 * math.pi * i / 48 for i in range(49)]
    outside = [(outer * math.cos(a), outer * math.sin(a)) for a in turn]
    inside = [(hole * math.cos(a), hole * math.sin(a)) for a in reversed(turn)]
    return outside + inside


def _heart() -> list[Point]:
    turn = [2 * math.pi * i / 64 for i in range(64)]
    wave = [(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) for a in turn]
    return [(math.sin(a) ** 3, -y / 16) for a, y in zip(turn, wave, strict=True)]


_ARM = 0.36
_OUTLINES: dict[str, list[Point]] = {
    "circle": _ring(0.95, 0.0),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "star": _regular(5, inner=0.42),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
    "ring": _ring(1.0, 0.58),
    "diamond": [(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)],
    "heart": _heart(),
}  # fmt: skip

SHAPE_KINDS: tuple[str, ...] = tuple(_OUTLINES)


def _downsample(canvas: Image.Image, width_px: int) -> Mask:
    small = canvas.resize((width_px, CELL_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


@cache
def shape_mask(kind: str, size_px: int, angle_deg: int) -> Mask:
    """The shape centred in its cell: [28, 28]."""
    side = CELL_PX * SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    radius, turn = size_px * SUPERSAMPLING / 2, math.radians(angle_deg)

    def place(point: Point) -> Point:
        x, y = point
        turned = (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn))
        return side / 2 + radius * turned[0], side / 2 + radius * turned[1]

    _polygon(_OUTLINES[kind])(ImageDraw.Draw(canvas), place)
    return _downsample(canvas, CELL_PX)


@cache
def glyph_mask(glyph: str, size_px: int) -> Mask:
    """One character of Pillow's built-in font, centred in half a cell: [28, 14]."""
    size = (GLYPH_WIDTH_PX * SUPERSAMPLING, CELL_PX * SUPERSAMPLING)
    canvas = Image.new("L", size)
    font = ImageFont.load_default(size=size_px * SUPERSAMPLING)
    ImageDraw.Draw(canvas).text((size[0] / 2, size[1] / 2), glyph, fill=255, font=font, anchor="mm")
    return _downsample(canvas, GLYPH_WIDTH_PX)
