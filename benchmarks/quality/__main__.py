"""How many answers stay right under compression: policies, retentions and tasks on fresh questions.

python -m benchmarks.quality --policies all oracle --retentions 0.2 0.1 0.05 --samples 550 --seed 7 --json -
"""

from __future__ import annotations

import os
import sys
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.quality.config import QualityConfig
from benchmarks.quality.rows import Figures
from benchmarks.quality.runner import QualityRunner
from benchmarks.quality.setting import FULL
from benchmarks.quality.tables import tables
from benchmarks.report import write_json


def measure(config: QualityConfig) -> list[dict[str, Any]]:
    """One row per policy, retention and task, and one with the task `all`; first those of the full cache."""
    runner = QualityRunner(config)
    figures = Figures([FULL, *runner.settings], config.tasks)
    total = config.samples * (1 + len(runner.settings))
    for outcome in tqdm(runner.outcomes(), total=total, unit="answer", file=sys.stderr):
        figures.add(outcome)
    return figures.rows()


def main() -> None:
    """Measures, prints tables, writes JSON."""
    config = tyro.cli(QualityConfig, description=__doc__)
    rows = measure(config)
    sys.stdout.write(tables(rows) + "\n")
    workload = {
        "samples": config.samples,
        "seed": config.seed,
        "model": os.path.relpath(config.model),
        "dtype": config.dtype,
        "scope": config.scope,
    }
    write_json(config.json, {"benchmark": "quality", "workload": workload, "results": rows})


if __name__ == "__main__":
    main()
