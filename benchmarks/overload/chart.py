"""The picture of a stored result: what each process holds in memory while more is asked than it can serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.plot import LINE_HEIGHT, MARGIN, NOTE_HEIGHT, WIDTH, page, text

HEIGHT, AXIS_WIDTH, NAME_WIDTH = 260, 50, 90
TICKS = 4
# The colours of bars, for lines.
LINES = """<style>
    polyline { fill: none; stroke-width: 2 }
    .l0 { stroke: #8c959f } .l1 { stroke: #2f6feb } .l2 { stroke: #1a7f5a }
    @media (prefers-color-scheme: dark) { .l0 { stroke: #6e7781 } .l1 { stroke: #58a6ff } .l2 { stroke: #3fb68b } }
</style>"""


def overload_chart(found: Mapping[str, Any], notes: Sequence[str]) -> str:
    """SVG: a line per process over the time of the overload, in MiB from zero.

    Args:
        found: What the benchmark wrote.
        notes: Lines below the title.
    """
    curve = found["results"][-1]["curve"]
    top = MARGIN + LINE_HEIGHT + NOTE_HEIGHT * len(notes)
    parts = [text(MARGIN, MARGIN + 14, _title(found), kind="title")]
    parts += [
        text(MARGIN, MARGIN + LINE_HEIGHT + row * NOTE_HEIGHT + 12, note, kind="note") for row, note in enumerate(notes)
    ]
    return page([LINES, *parts, *_plot(curve, top + LINE_HEIGHT)], top + HEIGHT + 3 * LINE_HEIGHT)


def _title(found: Mapping[str, Any]) -> str:
    minutes, rate = found["workload"]["minutes"], found["workload"]["rate"]
    return f"Resident memory in {minutes:g} minutes at {100 * rate:.0f} % of capacity, MiB"


def _plot(curve: Sequence[Mapping[str, Any]], top: int) -> list[str]:
    left, right, bottom = MARGIN + AXIS_WIDTH, WIDTH - MARGIN - NAME_WIDTH, top + HEIGHT
    names = list(curve[0]["rss_mib"])
    most = max(max(at["rss_mib"].values()) for at in curve)
    across, up = (right - left) / curve[-1]["at_s"], HEIGHT / most
    parts = [f'<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>']
    for tick in range(TICKS + 1):
        mib, minutes = most * tick / TICKS, curve[-1]["at_s"] / 60 * tick / TICKS
        parts.append(text(left - 8, bottom - mib * up + 4, f"{mib:.0f}", anchor="end"))
        parts.append(text(left + minutes * 60 * across, bottom + 18, f"{minutes:.1f} min", anchor="middle"))
    for series, name in enumerate(names):
        points = " ".join(f"{left + at['at_s'] * across:.1f},{bottom - at['rss_mib'][name] * up:.1f}" for at in curve)
        parts.append(f'<polyline class="l{series}" points="{points}"/>')
        parts.append(text(right + 8, bottom - curve[-1]["rss_mib"][name] * up + 4, name))
    return parts
