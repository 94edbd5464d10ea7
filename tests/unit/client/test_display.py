"""An answer in a notebook: what is shown, and that what a model wrote is never markup."""

import re
from html.parser import HTMLParser

import pytest
from vlcache._display import text_bar, to_html, to_markdown

from tests.unit.client.explain.answers import answer

EVIL = '<script>alert("x")</script>\n<img src=x onerror=y> & [a](javascript:b) `c` **d** $e$'


class Tags(HTMLParser):
    """Which tags there are, and the text between them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.depth = set(), "", 0

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.depth += tag != "br"
        assert all(name in ("style", "title") for name, _ in attrs)

    def handle_endtag(self, tag):
        self.depth -= 1

    def handle_data(self, data):
        self.text += data


def read(html):
    parser = Tags()
    parser.feed(html)
    assert parser.depth == 0
    return parser


def test_a_notebook_shows_answer_bar_and_cost():
    shown = answer(None)
    html = read(shown._repr_html_())
    assert html.text.startswith("a red dot")
    assert "width:12.5%" in shown._repr_html_()
    for part in shown.summary().split(" | "):
        assert part in html.text
    markdown = shown._repr_markdown_()
    assert markdown.startswith("> a red dot")
    assert f"`{text_bar(0.125)}` 12.5 %" in markdown


def test_an_answer_of_which_nothing_is_known_has_no_bar():
    shown = answer(None, compressed=False)
    assert "width" not in shown._repr_html_().replace("max-width", "")
    assert "█" not in shown._repr_markdown_()
    assert "KV" not in shown.summary()


def test_what_a_model_wrote_is_text():
    html = read(to_html([EVIL], ["<b>"], 0.5))
    assert html.tags == {"div"}
    assert html.text == EVIL + "<b>"
    markdown = to_markdown([EVIL], ["<b>"], 0.5)
    assert "<" not in markdown
    assert re.findall(r"(?<!\\)[\[\]*$(]", markdown) == []


def test_several_answers_are_numbered():
    assert read(to_html(["a", "b"], [], None)).text == "1. a2. b"
    assert to_markdown(["a", "b"], [], None) == "> 1\\. a  \n\n> 2\\. b  "


@pytest.mark.parametrize(("share", "cells"), [(0, 0), (0.001, 1), (0.5, 10), (1, 20)])
def test_what_is_there_has_a_cell(share, cells):
    assert text_bar(share) == "█" * cells + "░" * (20 - cells)


def test_the_text_of_an_answer_is_its_string():
    assert str(answer(None)) == "a red dot"
