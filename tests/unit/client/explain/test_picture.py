import dataclasses
import sys

import pytest
from PIL import Image, ImageChops
from vlcache import Guard, ImageGrid
from vlcache.explain.canvas import TEXT as TEXT_COLOR
from vlcache.explain.canvas import VISUAL
from vlcache.explain.picture import MARGIN, WIDTH, draw

from tests.unit.client.explain.answers import COLUMNS, HEADS, ROWS, TEXT, WHOLE, answer, encoded, grid, kept, red

PATCHES = ROWS * COLUMNS


def prompt(images: int, layers: int, count: int = 1):
    """Of every token, so many heads keep it; one text token behind each image."""
    grids = [grid(TEXT + at * (PATCHES + 1)) for at in range(images)]
    tokens = TEXT + images * (PATCHES + 1)
    return kept([[count] * tokens for _ in range(layers)], *grids)


def picture(images: int, layers: int, **more) -> Image.Image:
    what = prompt(images, layers, **more)
    return draw("Which?", answer(what), [encoded(red(120 + 30 * at)) for at in range(images)])


def pixels(image: Image.Image, color) -> list[tuple[int, int]]:
    width, data = image.width, image.tobytes()
    found = (at for at in range(0, len(data), 3) if tuple(data[at : at + 3]) == color)
    return [(at // 3 % width, at // 3 // width) for at in found]


@pytest.mark.parametrize("images", [1, 2, 3, 4, 7, 16, 20])
@pytest.mark.parametrize("layers", [1, 8, 40])
def test_any_number_of_images_and_layers_is_drawn(images, layers):
    made = picture(images, layers)
    assert made.mode == "RGB"
    assert made.width == WIDTH
    assert 400 < made.height < 6000
    edge = made.crop((WIDTH - MARGIN + 1, 0, WIDTH, made.height))
    assert edge.getcolors() == [(edge.width * edge.height, (255, 255, 255))], "something runs over the edge"


def test_everything_kept_shows_the_image_as_it_is():
    made = picture(1, 2, count=HEADS)
    clear = (200, 0, 0)
    assert len(pixels(made, clear)) > 528 * 528 * 90 / 120 * 0.9
    assert not pixels(picture(1, 2, count=0 + 1), clear)


def test_bars_are_as_long_as_the_budgets():
    visual, text = 6, 3
    layers = [[HEADS] * TEXT + [HEADS] * visual + [0] * (PATCHES - visual) + [HEADS]]
    layers.append([HEADS] * TEXT + [0] * (PATCHES + 1))
    made = draw("Which?", answer(kept(layers, grid())), [encoded(red())])
    areas = [len(pixels(made.crop((600, 190, 1050, made.height - 200)), color)) for color in (VISUAL, TEXT_COLOR)]
    assert areas[0] / areas[1] == pytest.approx(visual / (text + TEXT), rel=0.05)


def test_what_the_guard_did_is_said():
    plain = answer(prompt(1, 2))
    grown = dataclasses.replace(plain, compression=dataclasses.replace(plain.compression, guard=Guard.GROWN))
    changed = ImageChops.difference(*(draw("?", each, [encoded(red())]) for each in (plain, grown))).getbbox()
    assert changed is not None
    assert MARGIN + 30 < changed[1] < MARGIN + 90, "the line below question and answer"


def test_a_prompt_without_images_has_bars_alone():
    made = picture(0, 8)
    assert made.width == WIDTH
    assert pixels(made, TEXT_COLOR)
    assert len(pixels(made, VISUAL)) < 200, "its mark in the legend at most"


def test_long_words_and_foreign_letters_are_no_trouble():
    what = prompt(1, 2)
    made = draw("Wörter 中文 " + "x" * 500, answer(what, text="y " * 900), [encoded(red())])
    assert made.height < picture(1, 2).height + 150


def test_an_answer_that_was_never_handed_over_has_no_picture():
    with pytest.raises(ValueError, match="ended before its KV was handed over"):
        draw("Which?", answer(prompt(1, 2), compressed=False), [encoded(red())])


def test_an_older_service_says_nothing():
    with pytest.raises(ValueError, match="does not say which tokens"):
        draw("Which?", answer(None), [encoded(red())])


def test_tokens_of_overlapping_views_have_no_picture():
    views = ImageGrid(first_token=0, rows=0, columns=0, box=WHOLE)
    with pytest.raises(ValueError, match="several views that overlap"):
        draw("Which?", answer(kept([[4] * 9], views)), [encoded(red())])


def test_an_answer_draws_its_own_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(red()))
    what = answer(prompt(1, 2))
    drawn = draw("Which?", what, [encoded(red())])
    for source in (encoded(red()), tmp_path / "a.png", red()):
        assert what.explain([source], "Which?").tobytes() == drawn.tobytes()
    assert what.explain([red()]).height < drawn.height, "no line for no question"


def test_without_pillow_an_answer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vlcache.explain.picture", None)
    with pytest.raises(ValueError, match=r"pip install 'vlcache\[explain\]'"):
        answer(prompt(1, 2)).explain([red()])
