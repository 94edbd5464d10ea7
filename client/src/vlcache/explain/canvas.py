"""A page to draw on: colours, letters and lines that break."""

import functools
import unicodedata
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

WHITE: Color = (255, 255, 255)
INK: Color = (17, 24, 39)
QUIET: Color = (95, 103, 117)
RULE: Color = (225, 228, 233)
VISUAL: Color = (234, 88, 12)
TEXT: Color = (148, 160, 178)

# Beyond ASCII, the letters of Pillow's own font that are worth having.
_TYPOGRAPHY = "…“”\N{RIGHT SINGLE QUOTATION MARK}·"
_LINE = 1.35


class Canvas:
    """An RGB page of fixed size in pixels. All text is written with Pillow's own font."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), WHITE)
        self.pen = ImageDraw.Draw(self.image)

    def write(self, at: tuple[float, float], text: str, size: int, color: Color = INK, anchor: str = "la") -> None:
        """One line of text; `anchor` as in Pillow."""
        self.pen.text(at, printable(text), fill=color, font=_font(size), anchor=anchor)

    def fill(self, box: tuple[float, float, float, float], color: Color) -> None:
        """A rectangle: left, top, right, bottom, of which the last two are outside."""
        left, top, right, bottom = map(round, box)
        if right > left and bottom > top:
            self.pen.rectangle((left, top, right - 1, bottom - 1), fill=color)


def line_height(size: int) -> int:
    """Pixels from one line of text to the next."""
    return round(size * _LINE)


def text_width(text: str, size: int) -> float:
    """Pixels that a line takes."""
    return _font(size).getlength(printable(text))


def wrapped(text: str, size: int, width: float, max_lines: int) -> list[str]:
    """The text in lines of at most `width` pixels; what does not fit `max_lines` ends in an ellipsis."""
    lines = [""]
    for word in printable(text).split():
        grown = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and text_width(grown, size) > width:
            lines.append(word)
        else:
            lines[-1] = grown
    cut = len(lines) > max_lines
    return [shortened(line, size, width, cut and at == max_lines - 1) for at, line in enumerate(lines[:max_lines])]


def shortened(text: str, size: int, width: float, cut: bool = False) -> str:
    """The line with an ellipsis at its end where it was `cut` or is wider than `width` pixels."""
    if not cut and text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def printable(text: str) -> str:
    """What the font can show: accents go, dashes become hyphens, what else it lacks becomes a question mark."""
    return "".join(map(_shown, unicodedata.normalize("NFC", text)))


def _shown(letter: str) -> str:
    if letter in _TYPOGRAPHY or letter.isascii():
        return letter if letter.isprintable() else " "
    if unicodedata.category(letter) == "Pd":
        return "-"
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or "?"


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
