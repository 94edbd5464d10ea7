"""The table of policies in docs/compression.md, made from the classes: they say everything themselves.

python -m prefill_worker.compression.catalogue        rewrites it
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prefill_worker.compression.policy import Policy, parameters_of
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.registry import POLICIES
from prefill_worker.compression.rows import all_rows, post_vision_rows, probe_rows
from prefill_worker.compression.statistics import Statistic

GUIDE = Path(__file__).parents[2] / "docs" / "compression.md"
BEGIN, END = "<!-- policies: begin -->\n", "<!-- policies: end -->\n"
COLUMNS = ("policy", "idea", "paper", "observes", "budgets differ by", "also", "parameters and defaults")
# Text, image, text: with as many post-vision rows as no window has.
SAMPLE = PromptShape(visual=(torch.arange(600) >= 20) & (torch.arange(600) < 559))


def policy_table() -> str:
    """Markdown, one line per policy of the registry, in its order."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(policy) for policy in POLICIES.values())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(guide: str) -> str:
    """The guide with its table made anew.

    Raises:
        ValueError: It lacks one of the two marks.
    """
    before, rest = guide.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{policy_table()}{END}{after}"


def _cells(kind: type[Policy]) -> list[str]:
    title, idea = _headline(kind)
    file = f"[`{kind.name}`](../{kind.__module__.replace('.', '/')}.py)"
    defaults = [f"`{field.name}={field.default}`" for field in parameters_of(kind)]
    return [file, idea, title, _observed(kind()), _unit(kind), _also(kind), " ".join(defaults) or "none"]


def _headline(kind: type[Policy]) -> tuple[str, str]:
    """Name with paper, and idea, from the first line of the policy's file: `Name (paper): idea.`"""
    headline = (sys.modules[kind.__module__].__doc__ or "").split("\n", 1)[0]
    title, _, idea = headline.partition(": ")
    return title, idea.split(". ")[0].rstrip(".")


def _observed(policy: Policy) -> str:
    """The attention rows that its statistics see, for both values of `rows` where it has that parameter."""
    choices = [policy]
    if "rows" in {field.name for field in parameters_of(policy)}:
        choices.append(replace(policy, rows="probe"))  # type: ignore[type-var]
    names = [name for choice in choices for statistic in choice.needs(SAMPLE) for name in _rows(statistic)]
    if policy.look_ahead:
        names.append(f"the answer's first {policy.look_ahead} rows")
    return " or ".join(dict.fromkeys(names)) or "nothing"


def _rows(statistic: Statistic[Any]) -> Iterator[str]:
    observed = [value for value in vars(statistic).values() if isinstance(value, range | tuple)]
    for rows in observed:
        if rows == all_rows(SAMPLE):
            yield "all rows"
        elif rows == probe_rows(SAMPLE):
            yield "probe rows"
        elif rows == post_vision_rows(SAMPLE):
            yield "post-vision rows"
        else:
            yield f"last {len(rows)} rows"
    if not observed:
        # a statistic of its own that sees no rows, or always the same: its name says what
        yield re.sub(r"(?<!^)(?=[A-Z])", " ", type(statistic).__name__).lower()


def _unit(kind: type[Policy]) -> str:
    units = {"allocate": "layer", "share_heads": "head"}
    return _overridden(kind, units, " and ")


def _also(kind: type[Policy]) -> str:
    """What it does beside choosing tokens."""
    extras = {
        "merge": "merges dropped tokens",
        "sparse_prefill": "changes the pass",
        "eviction": "goes on while tokens are generated",
    }
    return _overridden(kind, extras, ", ")


def _overridden(kind: type[Policy], words: Mapping[str, str], separator: str) -> str:
    """The words for those stages that the policy makes its own."""
    own = [word for stage, word in words.items() if getattr(kind, stage) is not getattr(Policy, stage)]
    return separator.join(own) or "-"


def main() -> None:
    """Rewrites the table in place."""
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
