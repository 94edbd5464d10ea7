"""Pictures of benchmark results: one small SVG, drawn by hand, readable on light and dark pages."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, MARGIN = 760, 20
LABEL_WIDTH, VALUE_WIDTH = 190, 80
BAR_HEIGHT, BAR_GAP, GROUP_GAP, PANEL_GAP = 16, 3, 12, 18
LINE_HEIGHT, NOTE_HEIGHT = 24, 18
MOST_SERIES = 4
STYLE = """
    text { font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #24292f }
    .title { font-size: 15px; font-weight: 600 }
    .panel { font-weight: 600 }
    .note { font-size: 12px; fill: #57606a }
    .page { fill: #ffffff }
    .axis { stroke: #8c959f }
    .s0 { fill: #8c959f } .s1 { fill: #2f6feb } .s2 { fill: #1a7f5a } .s3 { fill: #bf8700 }
    @media (prefers-color-scheme: dark) {
      text { fill: #d0d7de }
      .note { fill: #8b949e }
      .page { fill: #0d1117 }
      .s0 { fill: #6e7781 } .s1 { fill: #58a6ff } .s2 { fill: #3fb68b } .s3 { fill: #d29922 }
    }
"""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Groups of bars that share one scale, from zero.

    Attributes:
        title: Quantity and unit.
        groups: Per label, values by series, none negative; None where there is none. A series left out has no bar.
        digits: Decimals of the values.
    """

    title: str
    groups: Mapping[str, Mapping[str, float | None]]
    digits: int = 1


def bar_chart(*, title: str, notes: Sequence[str], series: Sequence[str], panels: Sequence[Panel]) -> str:
    """SVG of horizontal bars: panels from top to bottom, in each its groups, in each a bar per series with its value.

    Args:
        title: What was measured.
        notes: Lines below it: of what, where.
        series: Names for the legend; the first one is drawn in grey, as what the others compare with.
        panels: Of these series.

    Raises:
        ValueError: More series than colours.
    """
    if len(series) > MOST_SERIES:
        raise ValueError(f"{MOST_SERIES} series at most have a colour, not {len(series)}: {', '.join(series)}")
    parts, top = [text(MARGIN, MARGIN + 14, title, kind="title")], MARGIN + LINE_HEIGHT
    for note in notes:
        parts.append(text(MARGIN, top + 12, note, kind="note"))
        top += NOTE_HEIGHT
    parts.append(_legend(series, top))
    top += LINE_HEIGHT + PANEL_GAP
    for panel in panels:
        drawn, top = _panel(panel, series, top)
        parts.append(drawn)
    return page(parts, top)


def page(parts: Sequence[str], height: int) -> str:
    """SVG of `height` pixels around what is drawn."""
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    body = "\n".join(['<rect class="page" width="100%" height="100%"/>', *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>{STYLE}</style>\n{body}\n</svg>\n'


def text(left: float, baseline: float, written: str, *, kind: str = "", anchor: str = "start", how: str = "") -> str:
    """An escaped text; `how`: further SVG attributes."""
    place = f'x="{left:.1f}" y="{baseline:.1f}" text-anchor="{anchor}"{how}'
    return f'<text {place} class="{kind}">{html.escape(written)}</text>'


def _legend(series: Sequence[str], top: int) -> str:
    step = (WIDTH - 2 * MARGIN) // MOST_SERIES
    return "\n".join(
        _bar(MARGIN + index * step, top + 4, 12, index) + text(MARGIN + index * step + 18, top + 16, name)
        for index, name in enumerate(series)
    )


def _panel(panel: Panel, series: Sequence[str], top: int) -> tuple[str, int]:
    """The panel, and where the next one begins."""
    largest = max((value or 0.0 for values in panel.groups.values() for value in values.values()), default=0.0)
    scale = (WIDTH - 2 * MARGIN - LABEL_WIDTH - VALUE_WIDTH) / (largest or 1.0)
    parts, left = [text(MARGIN, top + 12, panel.title, kind="panel")], MARGIN + LABEL_WIDTH
    top += LINE_HEIGHT
    begin = top
    for label, values in panel.groups.items():
        height = len(values) * (BAR_HEIGHT + BAR_GAP)
        parts.append(text(left - 10, top + height // 2 + 3, label, anchor="end"))
        for row, (name, value) in enumerate(values.items()):
            at = top + row * (BAR_HEIGHT + BAR_GAP)
            parts.append(_valued_bar(left, at, value, scale, series.index(name), panel.digits))
        top += height + GROUP_GAP
    parts.append(f'<line class="axis" x1="{left}" y1="{begin - 4}" x2="{left}" y2="{top - GROUP_GAP + 1}"/>')
    return "\n".join(parts), top + PANEL_GAP


def _valued_bar(left: int, top: int, value: float | None, scale: float, series: int, digits: int) -> str:
    if value is None:
        return text(left + 6, top + 13, "none")
    width = value * scale
    return _bar(left, top, width, series) + text(left + width + 6, top + 13, f"{value:.{digits}f}")


def _bar(left: float, top: float, width: float, series: int) -> str:
    return f'<rect class="s{series}" x="{left}" y="{top}" width="{width:.1f}" height="{BAR_HEIGHT}"/>'
