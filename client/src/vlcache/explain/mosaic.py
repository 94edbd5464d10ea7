"""The images of a request beside each other: through all layers at once, and through each layer alone."""

import math
from collections.abc import Sequence

from PIL import Image

from vlcache._kept import Kept
from vlcache.explain.canvas import INK, QUIET, Canvas, line_height
from vlcache.explain.overlay import DIM_PAPER, heat, overlay
from vlcache.explain.shares import all_shares, layer_budgets, layer_shares

# Pixels of an image's longer side, by how many stand beside each other.
_LARGE, _SMALL = (528, 340, 224, 166), (126, 78, 56, 42)
_BESIDE, _APART = 8, 16
_NOTE = 13
_LEGEND = 32
_STEPS = 12


class Mosaic:
    """Images in rows of equally many."""

    def __init__(self, kept: Kept, images: Sequence[Image.Image]) -> None:
        """Prepares; `images` are those of `kept`, in their order."""
        self._kept = kept
        self._images = images
        self._across = min(math.ceil(math.sqrt(len(images))), len(_LARGE))

    def summed(self) -> Image.Image:
        """Through all layers, with a legend."""
        seen = self._through(None, _LARGE[self._across - 1])
        canvas = Canvas(seen.width, seen.height + _LEGEND)
        canvas.image.paste(seen, (0, 0))
        self._legend(canvas, seen.height + 14)
        return canvas.image

    def layers(self, width: int) -> Image.Image:
        """Through each layer, as many beside each other as `width` pixels hold."""
        pages = [self._through(layer, _SMALL[self._across - 1]) for layer in range(len(self._kept.layers))]
        title, label = line_height(15) + 8, line_height(_NOTE) + 2
        step, down = pages[0].width + _APART, pages[0].height + label + 10
        across = (width + _APART) // step
        canvas = Canvas(width, title + math.ceil(len(pages) / across) * down)
        canvas.write((0, 0), "Each layer: clear where all its KV heads kept the patch, dim where none did", 15)
        for layer, (page, budget) in enumerate(zip(pages, layer_budgets(self._kept), strict=True)):
            x, y = layer % across * step, title + layer // across * down
            canvas.write((x, y), f"layer {layer}", _NOTE, INK)
            canvas.write((x + page.width, y), f"{budget.visual:.0f} patches", _NOTE, QUIET, "ra")
            canvas.image.paste(page, (x, y + label))
        return canvas.image

    def _through(self, layer: int | None, side: int) -> Image.Image:
        seen = [self._seen(at, layer, side) for at in range(len(self._images))]
        rows = [seen[at : at + self._across] for at in range(0, len(seen), self._across)]
        heights = [max(image.height for image in row) + _BESIDE for row in rows]
        canvas = Canvas(self._across * (side + _BESIDE) - _BESIDE, sum(heights) - _BESIDE)
        for at, image in enumerate(seen):
            row, column = divmod(at, self._across)
            canvas.image.paste(image, (column * (side + _BESIDE), sum(heights[:row])))
        return canvas.image

    def _seen(self, at: int, layer: int | None, side: int) -> Image.Image:
        """One image; numbered where it is one of several through all layers."""
        grid = self._kept.images[at]
        if layer is not None:
            return overlay(self._images[at], grid, layer_shares(self._kept, layer, grid), side, framed=False)
        seen = overlay(self._images[at], grid, all_shares(self._kept, grid), side, framed=True)
        if len(self._images) == 1:
            return seen
        title = line_height(_NOTE) + 2
        canvas = Canvas(seen.width, title + seen.height)
        canvas.write((0, 0), f"image {at + 1}", _NOTE)
        canvas.image.paste(seen, (0, title))
        return canvas.image

    def _legend(self, canvas: Canvas, y: int) -> None:
        heads = len(self._kept.layers) * self._kept.num_kv_heads
        canvas.fill((0, y, 16, y + 16), DIM_PAPER)
        canvas.write((24, y + 8), "dropped", _NOTE, QUIET, "lm")
        x = 100
        canvas.write((x, y + 8), "kept by 1", _NOTE, QUIET, "lm")
        for step in range(_STEPS):
            canvas.fill((x + 64 + 10 * step, y, x + 74 + 10 * step, y + 16), heat(step / (_STEPS - 1)))
        text = f"{heads}: all KV heads of all layers"
        canvas.write((x + 72 + 10 * _STEPS, y + 8), text, _NOTE, QUIET, "lm")
