"""The picture of second questions: what the choice for another question costs each policy, and what a prefix saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.plot import Panel, bar_chart
from benchmarks.quality.setting import ALL_TASKS
from benchmarks.second_question.outcome import FULL, OTHER, OWN, SAME

Row = Mapping[str, Any]

UNTOUCHED = "full cache"
SERIES = {
    OWN: "compressed for it",
    SAME: "images kept for it",
    OTHER: "kept for another",
}
WHOLE, TEXT = "whole prompt", "text over a retained prefix"


def second_question_chart(answers: Sequence[Row], costs: Sequence[Row], notes: Sequence[str]) -> str:
    """A panel of exact match where a tenth or about that is kept, and one of the passes' times."""
    rows = [row for row in answers if row["pairs_of"] == ALL_TASKS]
    (full,) = (row for row in rows if row["way"] == FULL)
    nearest = min((row["retention"] for row in rows if row["way"] != FULL), key=lambda kept: abs(kept - 0.1))
    times = {
        f"{row['images']} images" if row["images"] > 1 else "1 image": {
            UNTOUCHED: row["whole_ms"],
            SERIES[OWN]: row["text_ms"],
        }
        for row in costs
    }
    how = "kept for it or for another question: its text was prefilled anew over what was left of the images"
    return bar_chart(
        title="The second question about the same images",
        notes=[*notes, how],
        series=[UNTOUCHED, *SERIES.values()],
        panels=[
            _panel(rows, nearest, full),
            Panel(title=f"median pass, ms: {WHOLE} (grey), {TEXT} (blue)", groups=times),
        ],
    )


def _panel(rows: Sequence[Row], retention: float, full: Row) -> Panel:
    groups = {UNTOUCHED: {UNTOUCHED: 100 * full["exact_match"]}}
    for row in rows:
        if row["retention"] == retention and row["way"] in SERIES:
            groups.setdefault(row["policy"].replace("=true", ""), {})[SERIES[row["way"]]] = 100 * row["exact_match"]
    return Panel(title=f"exact match at retention {retention:g}, %", groups=groups)
