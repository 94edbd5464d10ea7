"""What is asked, and how often something dies meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from deploy.local.stack import StackConfig
from models.shapes_vlm.paths import CHECKPOINT
from shared.config import Dtype

# A parcel that nobody renews is given up after this.
LEASE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    """A load, and the rate at which its workers are killed."""

    requests: int = 1000
    """Answers to ask for."""
    kill_interval: float = 2.0
    """Seconds between two SIGKILLs; one that would take the last worker of a role is left out."""
    clients: int = 2
    """Requests at the same time; what is too much for the workers that are left waits, and recovery takes as long."""
    workers: int = 2
    """Workers of each role."""
    questions: int = 32
    """Different questions; every other one is answered with a temperature and a seed."""
    max_new_tokens: int = 200
    """Tokens of every answer: it goes on after its end, so that all have one length."""
    temperature: float = 1.0
    """Of every other question."""
    model: str = str(CHECKPOINT)
    """Checkpoint directory or hub id; prompts are about the bundled model's kind of images."""
    dtype: Dtype = "float32"
    """Precision of the workers: an answer that goes on in another batch is the same one where sums are exact enough."""
    seed: int = 31
    """Seed of questions, answers and deaths."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        for name in ("requests", "kill_interval", "clients", "questions", "max_new_tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}")
        if self.workers < 2:
            raise ValueError(f"somebody must be left to go on: workers must be at least 2, not {self.workers}")

    @property
    def stack(self) -> StackConfig:
        """What it is asked of."""
        return StackConfig(
            model=self.model,
            prefill_workers=self.workers,
            decode_workers=self.workers,
            dtype=self.dtype,
            prefill_flags=("--parcel-lease-s", str(LEASE_S), "--preprocess-processes", "1"),
            router_flags=("--poll-interval-s", "0.2"),
        )
