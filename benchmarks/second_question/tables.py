"""Tables for people: what a second question gets right by the way that the images were kept, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality.setting import ALL_TASKS
from benchmarks.report import table
from benchmarks.second_question.outcome import FULL, OTHER, OWN, SAME, WAYS
from benchmarks.second_question.rows import APART, SHARED

Row = Mapping[str, Any]
COLUMNS = [*((way, ALL_TASKS) for way in WAYS), *((way, group) for group in (APART, SHARED) for way in (SAME, OTHER))]


def tables(answers: Sequence[Row], agreements: Sequence[Row], costs: Sequence[Row]) -> str:
    """Markdown: exact match per setting and way, how equal re-compression is, and times."""
    (full,) = (row for row in answers if (row["way"], row["pairs_of"]) == (FULL, ALL_TASKS))
    return "\n\n".join(
        [
            f"Exact match of the second question, %; with the full cache {_right(full)}",
            _answers(answers),
            "Chosen from the retained prefix as from a pass of its own, %",
            _agreements(agreements),
            "Passes of the second question, medians",
            _costs(costs),
        ]
    )


def settings_in(answers: Iterable[Row]) -> list[tuple[str, float]]:
    """Policies and retentions of the rows that compress."""
    return list(dict.fromkeys((row["policy"], row["retention"]) for row in answers if row["way"] != FULL))


def _answers(answers: Sequence[Row]) -> str:
    cells = {(row["way"], row["pairs_of"], row["policy"], row["retention"]): row for row in answers}
    lines = []
    for policy, retention in settings_in(answers):
        found = [_right(cells.get((*column, policy, retention))) for column in COLUMNS]
        kept = [cells[way, ALL_TASKS, policy, retention]["realised_retention"] for way in (OWN, SAME, OTHER)]
        lines.append([policy, f"{retention:g}", *found, " / ".join(f"{100 * share:.1f}" for share in kept)])
    names = [way if group == ALL_TASKS else f"{way}, {group}" for way, group in COLUMNS]
    return table(["policy", "retention", *names, "kept: own / same / other"], lines)


def _agreements(rows: Sequence[Row]) -> str:
    names = ("same_kept_share", "same_kept_set_share")
    lines = [[row["policy"], f"{row['retention']:g}", *(f"{100 * row[name]:.2f}" for name in names)] for row in rows]
    return table(["policy", "retention", "kept tokens in common", "pairs with equal sets"], lines)


def _costs(rows: Sequence[Row]) -> str:
    lines = [
        [
            str(row["images"]),
            f"{row['prompt_tokens_mean']:.0f}",
            f"{row['text_tokens_mean']:.1f}",
            *(f"{row[name]:.1f}" for name in ("whole_ms", "vision_ms", "text_ms", "ratio")),
            *(f"{row[name] / 2**20:.1f}" for name in ("prefix_kv_bytes_mean", "prefix_query_bytes_mean")),
        ]
        for row in rows
    ]
    header = ["images", "prompt tokens", "text tokens", "whole pass, ms", "vision tower of it, ms", "text pass, ms"]
    return table([*header, "ratio", "prefix KV, MiB", "prefix queries, MiB"], lines)


def _right(row: Row | None) -> str:
    """Empty where there are no such pairs."""
    if row is None:
        return ""
    low, high = 100 * row["exact_match_low"], 100 * row["exact_match_high"]
    return f"{100 * row['exact_match']:.1f} [{low:.0f}, {high:.0f}]"
