"""Tables as pictures: one small SVG with a shaded cell per value, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.plot import LINE_HEIGHT, MARGIN, NOTE_HEIGHT, PANEL_GAP, WIDTH, page, text

LABEL_WIDTH = 270
CELL_WIDTH, CELL_HEIGHT, CELL_GAP = 34, 18, 2
# Of column names, which climb to the right: pixels in height per character, and below them.
HEADER_SLOPE, HEADER_GAP = 5.7, 14
# Pixels of a label's font, and of a wide character in it; a label without room gets a smaller font.
FONT_SIZE, CHARACTER = 12, 6.9
# Opacity of a cell at 0 and at 100: text stays readable on both pages.
FAINTEST, STRONGEST = 0.04, 0.6


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of percentages.

    Attributes:
        title: Quantity and unit.
        columns: Their names, from left to right.
        lines: Per label, values in [0, 100] by column; one left out has no cell.
    """

    title: str
    columns: Sequence[str]
    lines: Mapping[str, Mapping[str, float]]

    @property
    def header_height(self) -> int:
        """Pixels of title and column names."""
        return LINE_HEIGHT + HEADER_GAP + int(HEADER_SLOPE * max(map(len, self.columns), default=0))

    @property
    def height(self) -> int:
        """Pixels, the gap below it included."""
        return self.header_height + len(self.lines) * (CELL_HEIGHT + CELL_GAP) + PANEL_GAP


def heat_map(*, title: str, notes: Sequence[str], grids: Sequence[Grid]) -> str:
    """SVG of tables from top to bottom.

    Args:
        title: What was measured.
        notes: Lines below it: of what, where.
        grids: Of so many columns that they fit the width.

    Raises:
        ValueError: A grid has more columns than there is room for.
    """
    most = (WIDTH - LABEL_WIDTH - 2 * MARGIN) // (CELL_WIDTH + CELL_GAP)
    for grid in grids:
        if len(grid.columns) > most:
            raise ValueError(f"{most} columns at most have room, not {len(grid.columns)}: {', '.join(grid.columns)}")
    parts, top = [text(MARGIN, MARGIN + 14, title, kind="title")], MARGIN + LINE_HEIGHT
    for note in notes:
        parts.append(text(MARGIN, top + 12, note, kind="note"))
        top += NOTE_HEIGHT
    tops = list(accumulate((grid.height for grid in grids), initial=top + PANEL_GAP))
    parts += [_grid(grid, at) for grid, at in zip(grids, tops, strict=False)]
    return page(parts, tops[-1])


def _grid(grid: Grid, top: int) -> str:
    parts = [text(MARGIN, top + 12, grid.title, kind="panel")]
    top += grid.header_height
    lefts = {name: LABEL_WIDTH + MARGIN + i * (CELL_WIDTH + CELL_GAP) for i, name in enumerate(grid.columns)}
    parts += [_turned(left + CELL_WIDTH / 2 + 4, top - 6, name) for name, left in lefts.items()]
    for label, values in grid.lines.items():
        parts.append(_label(top + 13, label))
        parts += [_cell(lefts[name], top, value) for name, value in values.items()]
        top += CELL_HEIGHT + CELL_GAP
    return "\n".join(parts)


def _turned(left: float, baseline: float, name: str) -> str:
    return text(left, baseline, name, kind="note", how=f' transform="rotate(-55 {left:.1f} {baseline:.1f})"')


def _label(baseline: float, label: str) -> str:
    needed, room = CHARACTER * len(label), LABEL_WIDTH - 20
    smaller = f' style="font-size: {FONT_SIZE * room / needed:.1f}px"' if needed > room else ""
    return text(MARGIN + LABEL_WIDTH - 10, baseline, label, kind="note", anchor="end", how=smaller)


def _cell(left: float, top: float, value: float) -> str:
    opacity = FAINTEST + (STRONGEST - FAINTEST) * value / 100
    shade = f'fill-opacity="{opacity:.3f}"'
    box = f'<rect class="s1" x="{left}" y="{top}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" {shade}/>'
    return box + text(left + CELL_WIDTH / 2, top + 13, f"{value:.0f}", anchor="middle")
