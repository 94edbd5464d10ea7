"""Which policy places requests best: a simulation of hundreds of unequal workers with the router's own placement code.

Requests are skewed, bursty and heavy-tailed; routers see each other's load in reports that are up to a second old.
`random` and `clairvoyant` (knows everything, decides one request at a time) are below and above what a policy can do.

    python -m benchmarks.placement --json -
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.placement.config import PlacementConfig
from benchmarks.placement.decisions import COUNTS, decision_us
from benchmarks.placement.figures import HEADER, cases, figures, rows_of
from benchmarks.placement.newcomer import NEWCOMER_HEADER, newcomer_rows, newcomers
from benchmarks.placement.simulation import Simulation
from benchmarks.placement.trace import Trace, make_trace
from benchmarks.report import table, write_json


def main(argv: Sequence[str] | None = None) -> None:
    """Simulates, prints tables, writes JSON."""
    try:
        config = tyro.cli(PlacementConfig, args=argv, description=__doc__)
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
    found = simulate(config)
    sys.stdout.write(tables(found))
    workload = {name: value for name, value in dataclasses.asdict(config).items() if name != "json"}
    write_json(config.json, {"benchmark": "placement", "workload": workload, **found})


def simulate(config: PlacementConfig) -> dict[str, Any]:
    """All figures; every run has the same requests."""
    trace = make_trace(config)
    runs = len(cases(config)) + len(config.routers) * len(config.slow_starts_s)
    with tqdm(total=runs * config.requests, unit="request", file=sys.stderr, mininterval=1.0) as bar:
        results = [_compare(config, trace, *case, bar) for case in cases(config)]
        bar.set_description("newcomer")
        late = newcomers(config, trace, bar.update)
    return {"results": results, "newcomer": late, "decision_us": decision_us(config.seed)}


def tables(found: dict[str, Any]) -> str:
    """For people: policies, the newcomer, and what a decision takes."""
    counts = ("CPU µs per decision", *(f"{count} + {count} workers" for count in COUNTS))
    taken = [[name, *(f"{us:.0f}" for us in by.values())] for name, by in found["decision_us"].items()]
    parts = (
        table(HEADER, rows_of(found["results"])),
        table(NEWCOMER_HEADER, newcomer_rows(found["newcomer"])),
        table(counts, taken),
    )
    return "\n\n".join(parts) + "\n"


def _compare(config: PlacementConfig, trace: Trace, contender: str, routers: int, bar: tqdm[Any]) -> dict[str, Any]:
    bar.set_description(f"{contender}, {routers} routers")
    run = Simulation(config, trace, contender, routers)
    run.run(bar.update)
    run.check_integrity()
    return figures(contender, routers, run)


if __name__ == "__main__":
    main()
