"""The bar chart: lengths follow values, names are text and never markup."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from benchmarks.plot import WIDTH, Panel, bar_chart

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*panels: Panel, series: tuple[str, ...] = ("full", "kept")) -> ElementTree.Element:
    return ElementTree.fromstring(bar_chart(title="t", series=series, panels=panels))


def widths(root: ElementTree.Element, series: int) -> list[float]:
    """Bars of one series without its square in the legend."""
    return [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect") if bar.attrib["class"] == f"s{series}"][1:]


def test_bars_are_as_long_as_their_values_within_a_panel() -> None:
    root = drawn(
        Panel(title="a", groups={"x": [1.0, 4.0], "y": [2.0, 0.0]}),
        Panel(title="b", groups={"z": [500.0, 250.0]}),
    )
    longest = widths(root, 1)[0]
    assert widths(root, 0) == pytest.approx([longest / 4, longest / 2, longest], abs=0.1)
    assert widths(root, 1) == pytest.approx([longest, 0, longest / 2], abs=0.1)


def test_everything_lies_within_the_picture_and_nothing_overlaps() -> None:
    root = drawn(*(Panel(title="a", groups={"x": [1.0, 4.0], "y": [2.0, 3.0]}) for _ in range(3)))
    bars = [{key: float(bar.attrib[key]) for key in ("x", "y", "width", "height")} for bar in root.iter(f"{SVG}rect")]
    assert all(bar["x"] + bar["width"] <= WIDTH for bar in bars)
    assert max(bar["y"] + bar["height"] for bar in bars) <= float(root.attrib["height"])
    below = sorted(bar["y"] for bar in bars[2:])
    assert all(later - earlier >= 16 for earlier, later in itertools.pairwise(below))


def test_values_are_written_with_their_decimals_and_a_missing_one_has_no_bar() -> None:
    root = drawn(Panel(title="a", groups={"x": [1.256, None]}, digits=2))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "1.26" in texts
    assert "none" in texts
    assert widths(root, 1) == []


def test_nothing_but_zeros_is_no_division_by_zero() -> None:
    assert widths(drawn(Panel(title="a", groups={"x": [0.0, None]})), 0) == [0.0]
    assert widths(drawn(Panel(title="a", groups={})), 0) == []


def test_names_are_escaped() -> None:
    root = drawn(Panel(title="a < b", groups={"x & y": [1.0]}), series=("<s>",))
    assert {"a < b", "x & y", "<s>"} <= {text.text for text in root.iter(f"{SVG}text")}
