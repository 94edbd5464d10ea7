"""deploy/docker/Dockerfile as far as tests have to read it: instructions with the stages that they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.integration.prometheus_server import ROOT

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    """One instruction, continued lines joined."""

    stage: str
    """Name of the stage that it is part of; empty before the first one."""
    word: str
    rest: str


def instructions() -> list[Instruction]:
    return list(_instructions())


def of(stage: str, word: str) -> list[str]:
    """What follows `word` in a stage and in all those that it stands on, oldest first."""
    stages = {each.rest.split()[2]: each.rest.split()[0] for each in instructions() if each.word == "FROM"}
    lineage = [stage]
    while (below := stages.get(lineage[0])) in stages:
        lineage.insert(0, str(below))
    return [each.rest for one in lineage for each in instructions() if (each.stage, each.word) == (one, word)]


def _instructions() -> Iterator[Instruction]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    stage = ""
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.split()[2]
        yield Instruction(stage, word, rest)
