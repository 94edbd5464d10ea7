"""Images from strangers: what is opened looks as a viewer shows it, everything else is refused with a sentence."""

import io
import random
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from prefill_worker.preprocess import images
from prefill_worker.preprocess.images import open_image, open_images
from shared.errors import InvalidRequestError
from tests.unit.prefill_worker.prompts import encoded, picture

NOISE = picture(0, (24, 24))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, rows: bytes = b"") -> bytes:
    """A one-bit PNG that claims a size; `rows` is its compressed content."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """81 million pixels in about 10 KB: one black row, again and again."""
    return png_header(9000, 9000, rows=zlib.compress(bytes(9000 * (1 + 9000 // 8)), 9))


def text_bomb() -> bytes:
    """A good picture with 64 MiB of text in 64 KiB."""
    good = encoded(NOISE)
    return good[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9)) + good[33:]


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"></svg>'
BAD = {
    "nothing": (b"", "empty"),
    "random bytes": (random.Random(0).randbytes(3000), "no readable PNG, JPEG, WEBP"),
    "text": (b"hello", "no readable"),
    "svg": (SVG, "no readable"),
    "gif": (encoded(NOISE, "GIF"), "no readable"),
    "tiff": (encoded(NOISE, "TIFF"), "no readable"),
    "bmp": (encoded(NOISE, "BMP"), "no readable"),
    "ico": (encoded(NOISE, "ICO"), "no readable"),
    "half a png": (encoded(picture(1))[:700], "truncated or corrupt"),
    "half a jpeg": (encoded(picture(1), "JPEG")[:700], "truncated or corrupt"),
    "half a webp": (encoded(picture(1), "WEBP", lossless=True)[:700], "truncated or corrupt|no readable"),
    "a png signature": (b"\x89PNG\r\n\x1a\n", "truncated or corrupt|no readable"),
    "1 x 1": (encoded(Image.new("RGB", (1, 1))), "1 x 1 pixels; each side needs at least 8"),
    "a strip": (encoded(Image.new("L", (20_000, 8))), "20000 x 8 .* 200 times the other"),
    "a line": (encoded(Image.new("L", (20_000, 1))), "20000 x 1 .* at least 8"),
    "a bomb": (bomb(), "9000 x 9000 pixels; at most 40 million"),
    "a text bomb": (text_bomb(), "truncated or corrupt"),
    "a 400-megapixel claim": (png_header(20_000, 20_000), "20000 x 20000|truncated or corrupt"),
    "a no-size claim": (png_header(0, 0), "pixels|truncated or corrupt|no readable"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_opened_is_refused_with_a_sentence(name: str) -> None:
    data, sentence = BAD[name]
    with pytest.raises(InvalidRequestError, match=f"^image 3 .*({sentence})") as caught:
        open_image(data, 2)
    assert caught.value.reason == "BAD_IMAGE"
    # library texts leak paths and addresses
    assert not re.search(r"BytesIO|0x|Traceback|PIL", caught.value.message)


@pytest.mark.parametrize("name", ["a bomb", "1 x 1", "a strip", "a 400-megapixel claim"])
def test_a_forbidden_size_is_refused_from_the_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("a pixel was decoded"))
    with pytest.raises(InvalidRequestError):
        open_image(BAD[name][0], 0)


def test_too_many_bytes_are_refused_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(NOISE)
    monkeypatch.setattr(images, "MAX_BYTES", len(data))
    assert open_image(data, 0).size == NOISE.size
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(InvalidRequestError, match=f"image 1 has {len(data) + 1} bytes; at most {len(data)}"):
        open_image(data + b"\0", 0)


def shades() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def pixels(data: bytes) -> np.ndarray:
    image = open_image(data, 0)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_colours_survive(image_format: str) -> None:
    lossless = {"lossless": True} if image_format == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encoded(NOISE, image_format, **lossless)), np.asarray(NOISE))


def test_grey_of_8_and_of_16_bits_look_alike() -> None:
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(shades()))), grey(shades()))
    wide = shades().astype(np.uint16) * 256 + 99
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(wide))), grey(shades()))


def test_one_bit_palette_and_cmyk_become_rgb() -> None:
    checks = Image.fromarray(shades() > 100)
    np.testing.assert_array_equal(pixels(encoded(checks)), grey(np.asarray(checks) * np.uint8(255)))
    palette = NOISE.convert("P")
    np.testing.assert_array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    ink = pixels(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG"))
    assert ink[8, 8].tolist() == pytest.approx([0, 255, 255], abs=8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white(mode: str) -> None:
    image = Image.new(mode, (16, 16), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.paste(0 if mode == "LA" else (200, 0, 0, 255), (0, 0, 8, 16))
    if mode == "LA":
        image.putalpha(Image.linear_gradient("L").resize((16, 16)).point(lambda value: 255 if value > 127 else 0))
        assert pixels(encoded(image))[0].min() == 255
        assert pixels(encoded(image))[-1, 0].tolist() == [0, 0, 0]
    else:
        assert pixels(encoded(image))[3, [3, 12]].tolist() == [[200, 0, 0], [255, 255, 255]]


def test_a_transparent_palette_colour_is_white() -> None:
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(0, (0, 0, 16, 8))
    shown = pixels(encoded(palette, transparency=0))
    assert shown[[2, 12], 3].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_photograph_stands_upright(image_format: str, orientation: int) -> None:
    """As EXIF tag 274 says; values beyond 8 mean nothing."""
    upright = Image.new("L", (64, 32), 0)
    upright.paste(255, (0, 0, 16, 8))  # a mark at the upper left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[274] = orientation
    shown = pixels(encoded(stored.convert("RGB"), image_format, exif=exif.tobytes()))
    assert shown.shape == (32, 64, 3)
    marks = [shown[y, x, 0] > 127 for y, x in ((3, 3), (3, 60), (28, 3), (28, 60))]
    assert marks == [True, False, False, False]


@pytest.mark.parametrize("image_format", ["WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_seen(image_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], duration=40, **lossless)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert pixels(data)[5, 5].tolist() == [255, 0, 0]


EXIF = Image.Exif()
EXIF[274] = 6
EXIF[0x8769] = {0x9003: "2020:01:01"}
SEEDS = [
    encoded(NOISE),
    encoded(NOISE, "JPEG", exif=EXIF.tobytes()),
    encoded(NOISE, "JPEG", progressive=True),
    encoded(NOISE, "WEBP", exif=EXIF.tobytes()),
    encoded(NOISE.convert("P"), transparency=bytes(range(256))),
    encoded(NOISE, exif=EXIF.tobytes(), icc_profile=b"x" * 99),
    encoded(NOISE, save_all=True, append_images=[NOISE], duration=40),
]
EDITS = st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 255), st.booleans()), min_size=1, max_size=4)


def mended(data: bytes) -> bytes:
    """With right PNG checksums, so that damage reaches the parsers behind them."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + size]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return bytes(out)


def test_the_images_of_a_request_share_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(NOISE, "PNG")
    pixels = NOISE.width * NOISE.height
    monkeypatch.setattr(images, "MAX_REQUEST_PIXELS", 3 * pixels)
    assert len(open_images([file] * 3)) == 3
    with pytest.raises(InvalidRequestError, match="image 4 is too much"):
        open_images([file] * 4)


@given(seed=st.sampled_from(SEEDS), edits=EDITS, mend=st.booleans())
def test_a_damaged_file_opens_or_is_refused(seed: bytes, edits: list[tuple[int, int, bool]], mend: bool) -> None:
    data = bytearray(seed)
    for at, value, cut in edits:
        place = at % len(data)
        data[place : place + 4] = b"" if cut else bytes((value,)) + data[place + 1 : place + 4]
    file = mended(data) if mend and data.startswith(b"\x89PNG") else bytes(data)
    try:
        assert open_image(file, 0).mode == "RGB"
    except InvalidRequestError as error:
        assert error.message.startswith("image 1 ")  # noqa: PT017
