import pytest
from vlcache.explain.canvas import WHITE, Canvas, printable, shortened, text_width, wrapped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("What is it?", "What is it?"),
        ("Ça va \N{EN DASH} déjà", "Ca va - deja"),
        ("“quoted”…", "“quoted”…"),
        ("中文", "??"),
        ("two\nlines\t", "two lines "),
        ("e\u0301", "e"),
    ],
)
def test_only_what_the_font_has_is_written(text, shown):
    assert printable(text) == shown


def test_lines_break_between_words_and_end_in_an_ellipsis():
    text = "one two three four five six seven"
    whole = wrapped(text, 16, 100, 9)
    assert " ".join(whole) == text
    assert len(whole) > 2
    cut = wrapped(text, 16, 100, 2)
    assert cut[0] == whole[0]
    assert cut[1].endswith("…")
    assert all(text_width(line, 16) <= 100 for line in (*whole, *cut))


def test_a_word_that_is_too_wide_is_cut():
    (line,) = wrapped("x" * 99, 16, 100, 1)
    assert line.endswith("x…")
    assert text_width(line, 16) <= 100
    assert shortened("short", 16, 100) == "short"
    assert wrapped("", 16, 100, 2) == [""]


def test_nothing_is_drawn_of_an_empty_box():
    canvas = Canvas(4, 4)
    canvas.fill((1, 1, 1.2, 3), (0, 0, 0))
    assert canvas.image.getcolors() == [(16, WHITE)]
    canvas.fill((1, 1, 3, 3), (0, 0, 0))
    assert sorted(canvas.image.getcolors()) == [(4, (0, 0, 0)), (12, WHITE)]
