"""The bar chart: lengths follow values, names are text and never markup."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from benchmarks.plot import BAR_GAP, BAR_HEIGHT, WIDTH, Panel, bar_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*panels: Panel, series: tuple[str, ...] = ("full", "kept")) -> ElementTree.Element:
    return ElementTree.fromstring(bar_chart(title="t", notes=["n", "o"], series=series, panels=panels))


def texts(root: ElementTree.Element) -> set[str | None]:
    return {text.text for text in root.iter(f"{SVG}text")}


def widths(root: ElementTree.Element, series: int) -> list[float]:
    """Bars of one series without its square in the legend."""
    return [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect") if bar.attrib["class"] == f"s{series}"][1:]


def test_bars_are_as_long_as_their_values_within_a_panel() -> None:
    root = drawn(
        Panel(title="a", groups={"x": {"full": 1.0, "kept": 4.0}, "y": {"full": 2.0, "kept": 0.0}}),
        Panel(title="b", groups={"z": {"full": 500.0, "kept": 250.0}}),
    )
    longest = widths(root, 1)[0]
    assert widths(root, 0) == pytest.approx([longest / 4, longest / 2, longest], abs=0.1)
    assert widths(root, 1) == pytest.approx([longest, 0, longest / 2], abs=0.1)


def test_a_series_that_is_left_out_takes_no_room_and_no_ones_colour() -> None:
    root = drawn(Panel(title="a", groups={"x": {"kept": 4.0}, "y": {"full": 1.0, "kept": 2.0}}))
    full, kept = widths(root, 0), widths(root, 1)
    assert full == pytest.approx([kept[0] / 4], abs=0.1)
    assert kept[1] == pytest.approx(kept[0] / 2, abs=0.1)
    assert "none" not in texts(root)
    both = {"full": 1.0, "kept": 4.0}
    taller = drawn(Panel(title="a", groups={"x": both, "y": both}))
    assert float(taller.attrib["height"]) - float(root.attrib["height"]) == BAR_HEIGHT + BAR_GAP


def test_everything_lies_within_the_picture_and_nothing_overlaps() -> None:
    groups = {"x": {"full": 1.0, "kept": 4.0}, "y": {"full": 2.0, "kept": 3.0}}
    root = drawn(*(Panel(title="a", groups=groups) for _ in range(3)))
    drawn_bars = [bar for bar in root.iter(f"{SVG}rect") if bar.attrib["class"] != "page"]
    bars = [{key: float(bar.attrib[key]) for key in ("x", "y", "width", "height")} for bar in drawn_bars]
    assert all(bar["x"] + bar["width"] <= WIDTH for bar in bars)
    assert max(bar["y"] + bar["height"] for bar in bars) <= float(root.attrib["height"])
    below = sorted(bar["y"] for bar in bars[2:])
    assert all(later - earlier >= 16 for earlier, later in itertools.pairwise(below))
    # the legend too lies below the notes, which lie below the title
    lines = [float(text.attrib["y"]) for text in root.iter(f"{SVG}text")][:4]
    assert all(later - earlier >= 16 for earlier, later in itertools.pairwise(lines))


def test_values_are_written_with_their_decimals_and_a_missing_one_has_no_bar() -> None:
    root = drawn(Panel(title="a", groups={"x": {"full": 1.256, "kept": None}}, digits=2))
    assert {"1.26", "none"} <= texts(root)
    assert widths(root, 1) == []


def test_nothing_but_zeros_is_no_division_by_zero() -> None:
    assert widths(drawn(Panel(title="a", groups={"x": {"full": 0.0, "kept": None}})), 0) == [0.0]
    assert widths(drawn(Panel(title="a", groups={})), 0) == []


def test_a_picture_has_a_page_of_its_own_on_light_and_dark() -> None:
    root = drawn()
    page = next(root.iter(f"{SVG}rect"))
    assert (page.attrib["class"], page.attrib["width"], page.attrib["height"]) == ("page", "100%", "100%")


def test_more_series_than_colours_are_refused() -> None:
    with pytest.raises(ValueError, match="4 series at most have a colour, not 5: a, b, c, d, e"):
        drawn(series=tuple("abcde"))


def test_names_are_escaped() -> None:
    root = drawn(Panel(title="a < b", groups={"x & y": {"<s>": 1.0}}), series=("<s>",))
    assert {"a < b", "x & y", "<s>"} <= texts(root)
