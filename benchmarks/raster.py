"""A drawn picture as pixels, for pages that show no SVG."""

from __future__ import annotations

from tempfile import NamedTemporaryFile

import resvg_py
from PIL import ImageFont

# Pixels per pixel of the drawing: sharp on dense screens.
ZOOM = 2


def png(svg: str) -> bytes:
    """PNG of a picture as light pages show it; all text in Pillow's own font, alike on every machine."""
    font = ImageFont.load_default(size=12)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    family, _ = font.getname()
    with NamedTemporaryFile(suffix=".ttf") as file:
        file.write(font.font_bytes)
        file.flush()
        drawn = resvg_py.svg_to_bytes(
            svg_string=svg, skip_system_fonts=True, font_files=[file.name], sans_serif_family=family, zoom=ZOOM
        )
    return bytes(drawn)
