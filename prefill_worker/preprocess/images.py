"""Opens images that strangers sent: everything is checked from the header before a pixel is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from shared.errors import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 25 << 20
# A 10 KB PNG can claim 81 megapixels and cost 400 MB; Pillow only warns, and late.
MAX_PIXELS = 40_000_000
# All images of a request together; what 16 of the largest would take is gigabytes.
MAX_REQUEST_PIXELS = 2 * MAX_PIXELS
MIN_SIDE = 8
MAX_ASPECT = 200
# EXIF orientation to what makes the picture upright. Not Pillow's own `exif_transpose`: that writes the metadata back
# and fails on odd ones.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_images(encoded: Iterable[bytes]) -> list[Image.Image]:
    """Decodes all images of a request to RGB.

    Raises:
        InvalidRequestError: One of them is bad (see `open_image`), or together they have too many pixels.
    """
    images: list[Image.Image] = []
    for index, data in enumerate(encoded):
        taken = sum(image.width * image.height for image in images)
        images.append(open_image(data, index, pixels_left=MAX_REQUEST_PIXELS - taken))
    return images


def open_image(data: bytes, index: int, *, pixels_left: int = MAX_REQUEST_PIXELS) -> Image.Image:
    """Decodes one image to RGB; of an animation, the first frame.

    Args:
        data: The encoded file.
        index: Which image of the request this is, for the message.
        pixels_left: What the images before it left of the request's limit.

    Raises:
        InvalidRequestError: Not an image, a forbidden format, or a size outside the limits.
    """
    if not data:
        raise _bad(index, "is empty")
    if len(data) > MAX_BYTES:
        raise _bad(index, f"has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    try:
        with warnings.catch_warnings():
            # our own limits are stricter than the one that Pillow warns about, and a stranger's odd metadata
            # (EXIF, animation chunks) is nobody's concern here
            warnings.simplefilter("ignore")
            return _decode(data, index, pixels_left)
    except UnidentifiedImageError as error:
        raise _bad(index, f"is no readable {', '.join(FORMATS)} file") from error
    # Pillow's plugins raise all of these for broken files
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, Image.DecompressionBombError) as error:
        raise _bad(index, "is truncated or corrupt") from error


def _decode(data: bytes, index: int, pixels_left: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.size, index, pixels_left)
        image.load()
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        return _to_rgb(image if turn is None else image.transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    """As viewers show it: 16 bits of grey are scaled (Pillow would cut them off), transparency is white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        backdrop = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(backdrop, rgba).convert("RGB")
    return image.convert("RGB")


def _check_size(size: tuple[int, int], index: int, pixels_left: int) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _bad(index, f"has {width} x {height} pixels; at most {MAX_PIXELS // 1_000_000} million are allowed")
    if width * height > pixels_left:
        limit = MAX_REQUEST_PIXELS // 1_000_000
        raise _bad(index, f"is too much: the images of a request may have {limit} million pixels together")
    if min(size) < MIN_SIDE:
        raise _bad(index, f"has {width} x {height} pixels; each side needs at least {MIN_SIDE}")
    if max(size) > MAX_ASPECT * min(size):
        raise _bad(index, f"has {width} x {height} pixels; one side may be at most {MAX_ASPECT} times the other")


def _bad(index: int, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"image {index + 1} {what}", reason="BAD_IMAGE")
