"""A stored run as a page: its command, machine and tables stand between marks, made from the JSON beside it.

python -m benchmarks.quality.page benchmarks/results/quality_xeon.json

writes them to quality_xeon.md, which it makes where there is none; what stands around the marks is written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.quality.overview import (
    Row,
    at,
    contenders_in,
    judged_retention,
    of_several_images,
    ranked,
    retentions_in,
)
from benchmarks.quality.setting import ALL_TASKS, FULL
from benchmarks.report import table

Figures = Mapping[str, Any]

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
COLUMNS = """\
Exact match of the whole answer in %, 95 % Wilson intervals in brackets. Agreement: share of the full cache's tokens at
the same place. log p gap: per token of the full cache's answer. Kept: as realised, over all questions."""


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Which run."""

    result: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RESULT.json")]
    """JSON of one run of `benchmarks.quality`."""


def figures(found: Figures) -> str:
    """Markdown between the marks.

    Raises:
        ValueError: It is no run of the quality benchmark, or one that compares limits of the guard.
    """
    rows = found["results"] if found["benchmark"] == "quality" else []
    if not rows or any(row.get("max_dropped_attention", 1) < 1 for row in rows):
        raise ValueError("one run of benchmarks.quality without its guard is needed")
    judged = judged_retention(rows)
    parts = [
        f"```\n{command(found)}\n```",
        machine(found),
        COLUMNS,
        _overall(rows, judged),
        f"## By task at {100 * judged:g} %",
        _by_task(rows, judged),
    ]
    if several := _several_images(rows):
        parts += ["## Questions about several images at the smallest retentions", several]
    return "\n\n".join(parts)


def with_figures(page: str, written: str) -> str:
    """The page with what is written between its marks.

    Raises:
        ValueError: It has no marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{written}\n\n{END}{after}"


def blank_page(name: str) -> str:
    """A page that has nothing but marks."""
    return f"# {name}\n\n{BEGIN}\n{END}\n"


def command(found: Figures) -> str:
    """The command line of the run."""
    rows, workload = found["results"], found["workload"]
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task != ALL_TASKS]
    flags = {
        "samples": [workload["samples"]],
        "seed": [workload["seed"]],
        "retentions": [f"{kept:g}" for kept in retentions_in(rows)],
        "scope": [workload["scope"]],
        "tasks": tasks,
        "policies": contenders_in(rows),
    }
    words = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in flags.items())
    return _wrapped(f"python -m benchmarks.quality {words} --json -")


def _wrapped(line: str, width: int = 116) -> str:
    lines = [""]
    for word in line.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("  ")
        lines[-1] += f"{word} "
    return " \\\n".join(each.rstrip() for each in lines)


def machine(found: Figures) -> str:
    """Where it was measured."""
    where = found["environment"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers"))
    cpu = f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB"
    dtype = found["workload"]["dtype"]
    return f"Commit {where['commit']}; {cpu};\nPython {where['python']}, {versions}; dtype {dtype}."


def _overall(rows: Sequence[Row], judged: float) -> str:
    overall = [row for row in rows if row["task"] == ALL_TASKS]
    found = {(row["policy"], row["retention"]): row for row in overall}
    retentions = retentions_in(rows)
    percent = f"{100 * judged:g} %"
    header = ["policy", *(f"{100 * kept:g} %" for kept in retentions)]
    header += [f"{what} at {percent}" for what in ("agreement", "log p gap", "kept")]
    full = next(row for row in overall if row["policy"] == FULL.policy)
    lines = [[f"`{FULL.policy}`", _with_interval(full), *[""] * (len(header) - 2)]]
    for policy in ranked(rows):
        row = found[policy, judged]
        more = [f"{100 * row['agreement']:.1f} %", f"{row['log_probability_gap']:.2f}"]
        more.append(f"{100 * row['realised_retention']:.2f} %")
        lines.append([f"`{policy}`", *(_with_interval(found[policy, kept]) for kept in retentions), *more])
    return table(header, lines)


def _with_interval(row: Row) -> str:
    low, high = 100 * row["exact_match_low"], 100 * row["exact_match_high"]
    return f"{100 * row['exact_match']:.1f} [{low:.0f}, {high:.0f}]"


def _by_task(rows: Sequence[Row], judged: float) -> str:
    shown = [*(row for row in rows if row["policy"] == FULL.policy), *at(rows, judged)]
    cells = {(row["policy"], row["task"]): f"{100 * row['exact_match']:.0f}" for row in shown}
    tasks = list(dict.fromkeys(row["task"] for row in shown))
    lines = [[f"`{policy}`", *(cells[policy, task] for task in tasks)] for policy in (FULL.policy, *ranked(rows))]
    return table(["policy", *tasks], lines)


def _several_images(rows: Sequence[Row]) -> str:
    """Empty where no retention is that small."""
    shares = of_several_images(rows)
    retentions = sorted({kept for _, kept in shares}, reverse=True)
    lines = [[f"`{policy}`", *(f"{100 * shares[policy, kept]:.1f}" for kept in retentions)] for policy in ranked(rows)]
    return table(["policy", *(f"{100 * kept:g} %" for kept in retentions)], lines) if shares else ""


def write_page(result: Path, figures_of: Callable[[Any], str]) -> None:
    """Writes what `figures_of` makes of a stored result into the page beside it; exits with a sentence where it cannot.

    Args:
        figures_of: May raise ValueError for a result that is not for it.
    """
    page = result.with_suffix(".md")
    try:
        found = json.loads(result.read_text(encoding="utf-8"))
        before = page.read_text(encoding="utf-8") if page.exists() else blank_page(page.stem)
        page.write_text(with_figures(before, figures_of(found)), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"no page of {result}: {error}")


def main() -> None:
    """Writes the page beside the result."""
    write_page(tyro.cli(PageConfig, description=__doc__).result, figures)


if __name__ == "__main__":
    main()
