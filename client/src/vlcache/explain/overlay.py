"""An image through what was kept of it: kept patches are clear, dropped ones are dim."""

import io
import math
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageOps

from vlcache._kept import ImageGrid
from vlcache.explain.canvas import WHITE, Color

# Kept by few KV heads to kept by all.
SCALE: tuple[Color, ...] = ((255, 221, 87), (251, 146, 60), (220, 38, 38), (112, 26, 117))
# What is left of what the model never saw, of a patch that nobody kept, and of the colours of one that few heads kept.
_OUTSIDE, _DIM, _FAINT = 0.08, 0.25, 0.4
# Pixels by which what was dropped is out of focus: the noise of a photograph would be half of the file.
_BLUR = 1.5
# Steps of the shares between which a line is drawn, and pixels of a patch for one of its line's width.
_LEVELS, _PER_LINE = 6, 11
_PAPER: Color = (243, 244, 246)
DIM_PAPER: Color = (228, 230, 234)


Box = tuple[int, int, int, int]
"""Pixels: left, top, right, bottom, the last ones included."""


def open_image(data: bytes) -> Image.Image:
    """An encoded image as the model is shown it: upright, on white, RGB. Raises OSError when it is none."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:
            rgba = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba).convert("RGB")
        return upright.convert("RGB")


def heat(share: float) -> Color:
    """The colour of a share in (0, 1]."""
    at = min(share, 1.0) * (len(SCALE) - 1)
    below = min(int(at), len(SCALE) - 2)
    low, high, part = SCALE[below], SCALE[below + 1], at - below
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return (red, green, blue)


def overlay(image: Image.Image, grid: ImageGrid, shares: Sequence[float], side: int, *, framed: bool) -> Image.Image:
    """The image with its patches, in `side` times `side` pixels at most.

    shares: per patch, row after row, how many of those who could keep it did.
    framed: draws lines around patches of like shares, too, in the colours of `heat`.
    """
    shown, area = _laid_out(image, grid, side)
    clear = Image.new("L", shown.size, 0)
    pen = ImageDraw.Draw(clear)
    boxes = list(_patches(area, grid))
    for box, share in zip(boxes, shares, strict=True):
        if share > 0:
            pen.rectangle(box, fill=round(255 * (_FAINT + (1 - _FAINT) * share)))
    seen = Image.composite(shown, _dimmed(shown, boxes), clear)
    if framed:
        _draw_contours(seen, boxes, shares, grid.columns)
    return seen


def _dimmed(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    grey, white = image.convert("L").filter(ImageFilter.GaussianBlur(_BLUR)), Image.new("L", image.size, 255)
    dim, seen = Image.blend(white, grey, _OUTSIDE), (*boxes[0][:2], boxes[-1][2] + 1, boxes[-1][3] + 1)
    dim.paste(Image.blend(white, grey, _DIM).crop(seen), seen[:2])
    return dim.convert("RGB")


def _draw_contours(image: Image.Image, boxes: Sequence[Box], shares: Sequence[float], columns: int) -> None:
    """Lines in the colours of the patches on their higher side; patches of like shares have none between them."""
    pen, width = ImageDraw.Draw(image), max(1, round((boxes[0][2] - boxes[0][0]) / _PER_LINE))
    levels = [math.ceil(share * _LEVELS) for share in shares]
    for at, ((left, top, right, bottom), level) in enumerate(zip(boxes, levels, strict=True)):
        ends = (at % columns == 0, at < columns, at % columns == columns - 1, at + columns >= len(boxes))
        steps = (-1, -columns, 1, columns)
        lines = (
            (left, top, left + width - 1, bottom),
            (left, top, right, top + width - 1),
            (right - width + 1, top, right, bottom),
            (left, bottom - width + 1, right, bottom),
        )
        for end, step, line in zip(ends, steps, lines, strict=True):
            if level > (0 if end else levels[at + step]):
                pen.rectangle(line, fill=heat(shares[at]))


def _laid_out(image: Image.Image, grid: ImageGrid, side: int) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The image on paper that holds its grid, too, and where the grid lies there, in pixels."""
    left, top, right, bottom = grid.box
    paper = (min(0.0, left), min(0.0, top), max(1.0, right), max(1.0, bottom))
    width, height = (paper[2] - paper[0]) * image.width, (paper[3] - paper[1]) * image.height
    scale = side / max(width, height)
    across, down = scale * image.width, scale * image.height
    shown = Image.new("RGB", (max(1, round(scale * width)), max(1, round(scale * height))), _PAPER)
    resized = image.resize((max(1, round(across)), max(1, round(down))), Image.Resampling.LANCZOS)
    shown.paste(resized, (round(-paper[0] * across), round(-paper[1] * down)))
    area = (
        (left - paper[0]) * across,
        (top - paper[1]) * down,
        (right - paper[0]) * across,
        (bottom - paper[1]) * down,
    )
    return shown, area


def _patches(area: tuple[float, float, float, float], grid: ImageGrid) -> Iterator[Box]:
    """The patches, row after row; a pixel at least each."""
    left, top, right, bottom = area
    across = [round(left + (right - left) * at / grid.columns) for at in range(grid.columns + 1)]
    down = [round(top + (bottom - top) * at / grid.rows) for at in range(grid.rows + 1)]
    for row in range(grid.rows):
        for column in range(grid.columns):
            x, y = across[column], down[row]
            yield x, y, max(x, across[column + 1] - 1), max(y, down[row + 1] - 1)
