"""Opens images that strangers sent: everything is checked from the header before a pixel is decoded."""

from __future__ import annotations

import io
import warnings

from PIL import Image, UnidentifiedImageError

from shared.errors import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 25 << 20
# A 10 KB PNG can claim 81 megapixels and cost 400 MB; Pillow only warns, and late.
MAX_PIXELS = 40_000_000
MIN_SIDE = 8
MAX_ASPECT = 200


def open_image(data: bytes, index: int) -> Image.Image:
    """Decodes one image to RGB; of an animation, the first frame.

    Args:
        data: The encoded file.
        index: Which image of the request this is, for the message.

    Raises:
        InvalidRequestError: Not an image, a forbidden format, or a size outside the limits.
    """
    if not data:
        raise _bad(index, "is empty")
    if len(data) > MAX_BYTES:
        raise _bad(index, f"has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    try:
        with warnings.catch_warnings():
            # our own limits are stricter than the one that Pillow warns about
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _decode(data, index)
    except UnidentifiedImageError as error:
        raise _bad(index, f"is no readable {', '.join(FORMATS)} file") from error
    # Pillow's plugins raise all of these for broken files
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, Image.DecompressionBombError) as error:
        raise _bad(index, "is truncated or corrupt") from error


def _decode(data: bytes, index: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.size, index)
        image.load()
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Transparency shows white, as viewers do."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        backdrop = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(backdrop, rgba).convert("RGB")
    return image.convert("RGB")


def _check_size(size: tuple[int, int], index: int) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _bad(index, f"has {width} x {height} pixels; at most {MAX_PIXELS // 1_000_000} million are allowed")
    if min(size) < MIN_SIDE:
        raise _bad(index, f"has {width} x {height} pixels; each side needs at least {MIN_SIDE}")
    if max(size) > MAX_ASPECT * min(size):
        raise _bad(index, f"has {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other")


def _bad(index: int, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"image {index + 1} {what}", reason="BAD_IMAGE")
