"""What is measured, and on which stack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from benchmarks.serve.figures import parse_objectives
from benchmarks.serve.load import ClosedLoop, Load, OpenLoop
from deploy.local.stack import StackConfig
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import TASKS


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """What to measure. Every retention meets the same stack, the same loads and the same prompts."""

    address: str = ""
    """host:port of a stack that runs; a stack of its own is started when empty."""
    kv_memory_mib: int = 14
    """Own stack: memory of each decode worker for KV, MiB."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Own stack: precision of weights and KV."""
    prefill_workers: int = 1
    """Own stack: prefill workers."""
    decode_workers: int = 1
    """Own stack: decode workers."""
    threads: int = 0
    """Own stack: torch threads of each worker; 0 shares the cores out."""
    model: str = str(CHECKPOINT)
    """Own stack: checkpoint directory or hub id; prompts are about the bundled model's kind of images."""
    retentions: tuple[float, ...] = (1.0, 0.1)
    """Kept shares, each in (0, 1]; the smallest is compared with the largest."""
    concurrency: tuple[int, ...] = (2, 8)
    """Closed loops: clients that wait for their answers; each number is a load of its own."""
    request_rate: tuple[float, ...] = ()
    """Open loops instead: Poisson arrivals per second; each number is a load of its own, inf sends all at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps between arrivals; 1 is Poisson, less is burstier."""
    num_prompts: int = 48
    """Requests per load and retention."""
    phases: int = 2
    """Parts that they come in; loads and retentions take turns, in opposite order in every other phase."""
    warmup: int = 2
    """Requests per retention that are sent first and not counted."""
    tasks: tuple[str, ...] = ("which",)
    """Tasks to ask about, in turn: how many images a prompt has."""
    text_only: bool = False
    """Ask without the images."""
    max_new_tokens: int = 256
    """Tokens of every answer: it goes on after its end, so that all have one length."""
    goodput: tuple[str, ...] = ("ttft:2000", "tpot:50")
    """Objectives of goodput in ms, of ttft, tpot and e2el."""
    seed: int = 11
    """Seed of prompts and arrivals."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise ValueError(f"unknown tasks {sorted(unknown)}; known: {', '.join(TASKS)}")
        if not self.retentions or not all(0 < retention <= 1 for retention in self.retentions):
            raise ValueError(f"retentions must lie in (0, 1], not {self.retentions}")
        if not 1 <= self.phases <= self.num_prompts:
            raise ValueError(f"phases must lie between 1 and num_prompts, not {self.phases}")
        positive = (*self.concurrency, *self.request_rate, self.burstiness, self.max_new_tokens)
        if not self.loads or not all(number > 0 for number in positive):
            raise ValueError("concurrency, request_rate, burstiness and max_new_tokens must be greater than 0")
        if not math.isfinite(self.burstiness) or self.warmup < 0:
            raise ValueError("burstiness must be finite and warmup not negative")
        parse_objectives(self.goodput)

    @property
    def loads(self) -> tuple[Load, ...]:
        """What is put on the stack: the open loops if there are any, else the closed ones."""
        if self.request_rate:
            return tuple(OpenLoop(rate, self.burstiness) for rate in self.request_rate)
        return tuple(ClosedLoop(clients) for clients in self.concurrency)

    @property
    def stack(self) -> StackConfig:
        """The stack of its own."""
        return StackConfig(
            model=self.model,
            prefill_workers=self.prefill_workers,
            decode_workers=self.decode_workers,
            kv_memory_mib=self.kv_memory_mib,
            threads=self.threads,
            dtype=self.dtype,
        )
