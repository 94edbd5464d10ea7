"""A stored result as a picture.

python -m benchmarks.picture benchmarks/results/capacity_xeon.json --svg benchmarks/results/capacity_xeon.svg
"""

from __future__ import annotations

import importlib
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
    svg: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where to draw it."""
    png: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where to draw it in pixels; needs the extra `png`."""

    def __post_init__(self) -> None:
        if self.svg is None and self.png is None:
            raise ValueError("nothing to draw: give --svg FILE, --png FILE or both")


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


def in_pixels(svg: str) -> bytes:
    """PNG of a picture.

    Raises:
        ValueError: The extra `png` is not installed.
    """
    try:
        raster = importlib.import_module("benchmarks.raster")
    except ImportError as error:
        raise ValueError(f"pixels need resvg: pip install '.[png]' ({error})") from error
    return raster.png(svg)


def draw(config: PictureConfig) -> None:
    """Draws what is asked for, or nothing.

    Raises:
        ValueError: See `picture` and `in_pixels`.
        OSError: A file cannot be read or written.
    """
    drawn = picture(json.loads(config.result.read_text(encoding="utf-8")))
    if config.png is not None:
        config.png.write_bytes(in_pixels(drawn))
    if config.svg is not None:
        config.svg.write_text(drawn, encoding="utf-8")


def main() -> None:
    """Reads a result, draws it."""
    config = tyro.cli(PictureConfig, description=__doc__)
    try:
        draw(config)
    except (OSError, ValueError) as error:
        sys.exit(f"no picture of {config.result}: {error}")


if __name__ == "__main__":
    main()
