"""What is measured, and on which stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from benchmarks.serve.figures import parse_objectives
from deploy.local.stack import StackConfig
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import TASKS

# Of the length of the overload: that of the closed loop, and that of the load at capacity.
EARLIER_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class OverloadConfig:
    """How much is asked of a stack, and how much it may keep waiting."""

    minutes: float = 10.0
    """Length of the overload; what comes before takes a fifth of it each."""
    rate: float = 1.2
    """The overload, in capacities."""
    clients: int = 12
    """Clients of the closed loop that measures the capacity."""
    kv_memory_mib: int = 8
    """Memory of the decode worker for KV, MiB: little enough to bind."""
    max_waiting: int = 16
    """Requests that the router keeps waiting."""
    retention: float = 0.1
    """Kept share of the prompts' KV."""
    max_new_tokens: int = 64
    """Tokens of every answer: it goes on after its end, so that all have one length."""
    tasks: tuple[str, ...] = ("which",)
    """Tasks to ask about, in turn: how many images a prompt has."""
    prompts: int = 512
    """Different prompts; a longer load asks them again from the beginning."""
    goodput: tuple[str, ...] = ("ttft:5000",)
    """Objectives of goodput in ms, of ttft, tpot and e2el."""
    model: str = str(CHECKPOINT)
    """Checkpoint directory or hub id; prompts are about the bundled model's kind of images."""
    seed: int = 12
    """Seed of prompts and arrivals."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        for name in ("minutes", "clients", "kv_memory_mib", "max_new_tokens", "prompts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}")
        if self.rate <= 1:
            raise ValueError(f"rate is in capacities and must be greater than 1, not {self.rate}")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting must not be negative, not {self.max_waiting}")
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention must lie in (0, 1], not {self.retention}")
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks are among {', '.join(TASKS)}, not {self.tasks}")
        parse_objectives(self.goodput)

    @property
    def overload_s(self) -> float:
        """Seconds of the overload."""
        return self.minutes * 60

    @property
    def earlier_s(self) -> float:
        """Seconds of the closed loop, and of the load at capacity."""
        return self.overload_s * EARLIER_SHARE

    @property
    def stack(self) -> StackConfig:
        """What it is put on."""
        return StackConfig(
            model=self.model,
            kv_memory_mib=self.kv_memory_mib,
            router_flags=("--max-waiting", str(self.max_waiting)),
        )
