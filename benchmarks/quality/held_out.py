"""Does what was chosen on some kinds of questions hold for another kind? Each kind is left out in turn.

Of every family of policies (look-ahead as a selection and as served, the published methods, the oracles) the setting is
chosen that is best on average over the other kinds of a first run; what it answers of the kind that was left out comes
from a second run with other questions. Kinds that the first run lacks are answered by what is best over all of its.

    closed = (ours - published) / (oracle - published)       of mean exact match over kinds

with a 95 % interval from resampling the questions of each kind, the same ones for all families.

python -m benchmarks.quality.held_out benchmarks/results/held_out_xeon.json

reads a list of runs of `benchmarks.quality`, the first one to choose by, and writes the page beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from benchmarks.quality.overview import Row, at, contenders_in, retentions_in
from benchmarks.quality.page import command, machine, write_page
from benchmarks.quality.setting import ALL_TASKS, FULL
from benchmarks.report import table

Figures = Mapping[str, Any]

PUBLISHED, ORACLE, SELECTION, SERVED = "published", "oracle", "look-ahead, selection alone", "look-ahead, as served"
FAMILIES: Mapping[str, Callable[[str], bool]] = {
    PUBLISHED: lambda policy: not policy.startswith(("oracle", "look_ahead")),
    ORACLE: lambda policy: policy.startswith("oracle"),
    SELECTION: lambda policy: policy.startswith("look_ahead") and "hand_off=false" in policy,
    SERVED: lambda policy: policy.startswith("look_ahead") and "hand_off=false" not in policy,
}
# A kind counts where the full cache answers that share: else compression is not what loses.
MASTERED = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Which runs."""

    result: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUNS.json")]
    """A list of runs: the first one to choose by, the others to judge on."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of questions at one retention.

    Attributes:
        known: Whether the first run has it, too.
        full: Exact match with the full cache.
        chosen: Setting by family.
        answers: Which questions were right, [samples] bool by family.
    """

    task: str
    known: bool
    full: float
    chosen: Mapping[str, str]
    answers: Mapping[str, NDArray[np.bool_]]


def best(rows: Sequence[Row], family: str, without: str) -> str:
    """The family's setting with the highest mean over the kinds but one; of equals, the first that was measured."""

    def mean(policy: str) -> float:
        mine = [row for row in rows if row["policy"] == policy and row["task"] not in (ALL_TASKS, without)]
        return fmean(row["exact_match"] for row in mine)

    return max((policy for policy in contenders_in(rows) if FAMILIES[family](policy)), key=mean)


def kinds_of(runs: Sequence[Figures], retention: float) -> list[Kind]:
    """Every kind of the runs after the first one."""
    tuned, kinds = at(runs[0]["results"], retention), []
    known = {row["task"] for row in tuned}
    for run in runs[1:]:
        found = {(row["policy"], row["task"]): row for row in at(run["results"], retention)}
        full = {row["task"]: row["exact_match"] for row in run["results"] if row["policy"] == FULL.policy}
        for task in (task for task in full if task != ALL_TASKS):
            chosen = {family: best(tuned, family, task) for family in FAMILIES}
            rights = {family: _rights(found[policy, task]) for family, policy in chosen.items()}
            kinds.append(Kind(task=task, known=task in known, full=full[task], chosen=chosen, answers=rights))
    return kinds


def gap_closed(kinds: Sequence[Kind], family: str, resamples: int = RESAMPLES) -> tuple[float, float, float] | None:
    """The share of the gap from the best published method to the oracle, and its 95 % interval.

    Resamples without a gap say nothing and are left out; None where the questions themselves have none.
    """
    draws = np.random.default_rng(0)
    means = {name: np.zeros(resamples + 1) for name in (PUBLISHED, ORACLE, family)}
    for kind in kinds:
        samples = len(kind.answers[family])
        drawn = np.vstack([np.arange(samples), draws.integers(samples, size=(resamples, samples))])
        for name, mean in means.items():
            mean += kind.answers[name][drawn].mean(axis=1) / len(kinds)
    gap = means[ORACLE] - means[PUBLISHED]
    if gap[0] <= 0:
        return None
    closed = (means[family] - means[PUBLISHED])[gap > 0] / gap[gap > 0]
    low, high = np.percentile(closed[1:], [2.5, 97.5])
    return float(closed[0]), float(low), float(high)


def figures(runs: Sequence[Figures]) -> str:
    """Markdown of all retentions that the runs share.

    Raises:
        ValueError: Fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError("a run to choose by and at least one to judge on are needed")
    parts = [f"```\n{command(run)}\n```\n\n{machine(run)}" for run in runs]
    compared = [set(retentions_in(run["results"])) for run in runs]
    for retention in sorted(set.intersection(*compared), reverse=True):
        parts += _at_retention(kinds_of(runs, retention), retention)
    return "\n\n".join(parts)


def _rights(row: Row) -> NDArray[np.bool_]:
    return np.array([answer == "1" for answer in row["answers"]])


def _at_retention(kinds: Sequence[Kind], retention: float) -> list[str]:
    families = list(FAMILIES)
    lines = [_line(kind.task, kind.full, {name: kind.answers[name].mean() for name in families}) for kind in kinds]
    groups = {
        "mastered kinds, each left out": [kind for kind in kinds if kind.known and kind.full >= MASTERED],
        "mastered new kinds": [kind for kind in kinds if not kind.known and kind.full >= MASTERED],
    }
    groups = {name: group for name, group in groups.items() if group}
    for name, group in groups.items():
        means = {family: fmean(kind.answers[family].mean() for kind in group) for family in families}
        lines.append(_line(f"**{name}**", fmean(kind.full for kind in group), means))
    closed = [
        [name, *(_closed(gap_closed(group, family)) for family in (SELECTION, SERVED))]
        for name, group in groups.items()
    ]
    chosen = [[kind.task, *(f"`{kind.chosen[name]}`" for name in families)] for kind in kinds]
    return [
        f"## At {100 * retention:g} %",
        table(["kind", "full", *families], lines),
        f"Closed of the gap from {PUBLISHED} to {ORACLE}, %, 95 % interval in brackets:",
        table(["", SELECTION, SERVED], closed),
        "Chosen without the kind:",
        table(["kind", *families], chosen),
    ]


def _line(name: str, full: float, shares: Mapping[str, float]) -> list[str]:
    return [name, *(f"{100 * share:.1f}" for share in (full, *shares.values()))]


def _closed(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "no gap"
    share, low, high = (100 * value for value in found)
    return f"{share:.0f} [{low:.0f}, {high:.0f}]"


def main() -> None:
    """Writes the page beside the runs."""
    write_page(tyro.cli(HeldOutConfig, description=__doc__).result, figures)


if __name__ == "__main__":
    main()
