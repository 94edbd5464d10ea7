"""A stored result as a picture.

python -m benchmarks.picture benchmarks/results/capacity_xeon.json --svg benchmarks/results/capacity_xeon.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.charts import CHARTS, Figures


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """What to draw."""

    result: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RESULT.json")]
    """A benchmark's JSON; a list of several runs where the benchmark's picture compares them."""
    svg: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Where to draw it."""


def picture(stored: Figures | Sequence[Figures]) -> str:
    """SVG of a benchmark's JSON.

    Raises:
        ValueError: There is no picture of that benchmark, or not of so many runs or series.
    """
    runs = [stored] if isinstance(stored, Mapping) else stored
    names = {run["benchmark"] for run in runs}
    if len(names) != 1 or not names <= set(CHARTS):
        raise ValueError(f"one benchmark of {', '.join(CHARTS)} is needed, not {', '.join(sorted(names)) or 'none'}")
    return CHARTS[names.pop()](runs)


def main() -> None:
    """Reads a result, draws it."""
    config = tyro.cli(PictureConfig, description=__doc__)
    try:
        drawn = picture(json.loads(config.result.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        sys.exit(f"no picture of {config.result}: {error}")
    config.svg.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
