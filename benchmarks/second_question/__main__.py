"""What a parcel that was compressed for one question is worth for another one about the same images.

    full    the full cache
    own     the whole prompt is prefilled and compressed for the second question: what the service does
    prefix  the images' full KV was retained: the text alone is prefilled over it, then all is compressed for it
    same    what was kept of the images for the second question, and its whole text, prefilled once more over that
    other   what was kept of the images for the first question, and the second one's whole text, prefilled over that

python -m benchmarks.second_question --pairs 165 --seed 11 --json -
"""

from __future__ import annotations

import os
import sys

import tyro
from tqdm import tqdm

from benchmarks.report import write_json
from benchmarks.second_question.config import SecondQuestionConfig
from benchmarks.second_question.cost import cost_rows
from benchmarks.second_question.outcome import WAYS
from benchmarks.second_question.rows import agreement_rows, answer_rows
from benchmarks.second_question.runner import SecondQuestionRunner
from benchmarks.second_question.tables import tables


def main() -> None:
    """Measures, prints tables, writes JSON."""
    config = tyro.cli(SecondQuestionConfig, description=__doc__)
    runner = SecondQuestionRunner(config)
    total = config.pairs * (1 + len(WAYS) * len(config.settings))
    outcomes = list(tqdm(runner.outcomes(), total=total, unit="answer", file=sys.stderr))
    found = {
        "results": answer_rows(outcomes, config.settings, config.tasks),
        "from_prefix": agreement_rows(runner.agreements),
        "costs": cost_rows(runner.costs),
    }
    sys.stdout.write(tables(*found.values()) + "\n")
    workload = {
        "pairs": config.pairs,
        "seed": config.seed,
        "model": os.path.relpath(config.model),
        "dtype": config.dtype,
    }
    write_json(config.json, {"benchmark": "second_question", "workload": workload, **found})


if __name__ == "__main__":
    main()
