import pytest
from PIL import ExifTags, Image
from vlcache.explain.overlay import heat, open_image, overlay

from tests.unit.client.explain.answers import COLUMNS, ROWS, encoded, grid, red

PATCHES = ROWS * COLUMNS
SIDE = 120


def seen(shares: dict[int, float], *, box=(0.0, 0.0, 1.0, 1.0), image=None, framed=False) -> Image.Image:
    every = [shares.get(patch, 0) for patch in range(PATCHES)]
    return overlay(image or red(), grid(box=box), every, SIDE, framed=framed)


def middle(picture: Image.Image, patch: int, left=0.0, top=0.0, right=1.0, bottom=1.0) -> tuple[int, int, int]:
    """The colour in the middle of a patch of a grid that covers these shares of the picture."""
    row, column = divmod(patch, COLUMNS)
    x = left + (right - left) * (column + 0.5) / COLUMNS
    y = top + (bottom - top) * (row + 0.5) / ROWS
    return picture.getpixel((int(x * picture.width), int(y * picture.height)))


def redness(color: tuple[int, int, int]) -> int:
    return color[0] - color[2]


def test_what_was_kept_is_clear_and_what_was_dropped_is_dim():
    picture = seen({0: 1.0, 5: 0.25, 6: 0.75})
    assert picture.size == (SIDE, SIDE * 3 // 4)
    assert middle(picture, 0) == (200, 0, 0)
    strengths = [redness(middle(picture, patch)) for patch in (1, 5, 6, 0)]
    assert strengths[0] == 0
    assert strengths == sorted(set(strengths))
    assert min(middle(picture, 1)) > 190


@pytest.mark.parametrize("size", [(120, 90), (90, 120), (7, 500), (1000, 1000)])
def test_any_image_fits_the_side(size):
    picture = seen({2: 1.0}, image=red(*size))
    assert max(picture.size) == SIDE
    assert redness(middle(picture, 2)) > 100


def test_lines_are_drawn_where_shares_change_and_nowhere_else():
    everything = seen(dict.fromkeys(range(PATCHES), 1.0), framed=True)
    assert everything.getpixel((0, 0)) == heat(1.0)
    inside = everything.crop((5, 5, everything.width - 5, everything.height - 5))
    assert inside.getcolors() == [(inside.width * inside.height, (200, 0, 0))]
    alone = seen({5: 1.0}, framed=True)
    left, top = SIDE // COLUMNS, SIDE // COLUMNS
    assert alone.getpixel((left, top)) == heat(1.0)
    assert redness(alone.getpixel((left - 1, top))) == 0
    assert middle(alone, 5) == (200, 0, 0)


def test_what_the_model_never_saw_is_paler_than_what_was_dropped():
    picture = seen({0: 1.0}, box=(0.25, 0.0, 0.75, 1.0))
    assert picture.size == (120, 90)
    assert middle(picture, 0, left=0.25, right=0.75) == (200, 0, 0)
    outside, dropped = picture.getpixel((10, 45)), middle(picture, 5, left=0.25, right=0.75)
    assert 255 > min(outside) > min(dropped)


def test_a_padded_image_lies_on_paper_that_holds_the_grid():
    picture = seen({0: 1.0, 5: 1.0}, image=red(120, 60), box=(0.0, -0.5, 1.0, 1.5))
    assert picture.size == (SIDE, SIDE)
    assert middle(picture, 5) == (200, 0, 0)
    assert redness(middle(picture, 0)) < 10


def test_the_colours_of_the_scale_differ():
    colors = [heat(share / 10) for share in range(11)]
    assert len(set(colors)) == 11
    assert heat(2.0) == heat(1.0)


def test_an_image_is_opened_upright_on_white():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert open_image(encoded(red(40, 20), "JPEG", exif=exif)).size == (20, 40)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert open_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    assert open_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("L", (4, 4), 7))).getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(OSError, match="identify"):
        open_image(b"no image")
