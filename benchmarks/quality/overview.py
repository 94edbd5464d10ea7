"""What tables and picture of many policies have in common: which retentions, who comes first, small budgets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.quality.setting import ALL_TASKS, FULL
from models.shapes_vlm.questions import NUM_IMAGES

Row = Mapping[str, Any]

# Below it the floor of 16 tokens per layer is more than the budget of a prompt with one image.
FLOOR_RETENTION = 0.03


def contenders_in(rows: Iterable[Row]) -> list[str]:
    """The policies that compress."""
    return list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != FULL.policy))


def retentions_in(rows: Iterable[Row]) -> list[float]:
    """At which something is dropped, the largest first."""
    return sorted({row["retention"] for row in rows if row["retention"] < 1}, reverse=True)


def judged_retention(rows: Sequence[Row]) -> float:
    """The one that is shown by task: a tenth, or what is nearest to it."""
    return min(retentions_in(rows), key=lambda kept: abs(kept - 0.1))


def ranked(rows: Sequence[Row]) -> list[str]:
    """The policies, those first that keep most answers right over all tasks and retentions."""
    overall = [row for row in rows if row["task"] == ALL_TASKS and row["retention"] < 1]
    scores = {
        policy: sum(row["exact_match"] for row in overall if row["policy"] == policy)
        for policy in dict.fromkeys(row["policy"] for row in overall)
    }
    return sorted(scores, key=lambda policy: -scores[policy])


def at(rows: Iterable[Row], retention: float) -> list[Row]:
    """Of this retention."""
    return [row for row in rows if row["retention"] == retention]


def of_several_images(rows: Sequence[Row]) -> dict[tuple[str, float], float]:
    """Exact match by policy and retention on tasks with several images, where the budget of one image is its floor."""
    small = [row for row in rows if row["retention"] < FLOOR_RETENTION and NUM_IMAGES.get(row["task"], 1) > 1]
    found: dict[tuple[str, float], list[float]] = {}
    for row in small:
        found.setdefault((row["policy"], row["retention"]), []).append(row["exact_match"])
    return {key: fmean(shares) for key, shares in found.items()}
