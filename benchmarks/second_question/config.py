"""What the benchmark of a second question measures, from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import tyro

from benchmarks.quality.contenders import Contender, contenders_of
from benchmarks.quality.setting import Setting
from benchmarks.second_question.reuse import only_selects
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import TASKS
from prefill_worker.compression.registry import POLICIES
from shared.config import Dtype
from shared.errors import InvalidRequestError
from shared.request.params import Budget

# The default, a question-blind floor, and what does best of the rest.
COMPARED = ("vl_cache", "vl_cache:shared_heads=false", "mix_kv", "expected_attention", "streaming_llm", "look_ahead")


@dataclass(frozen=True, kw_only=True)
class SecondQuestionConfig:
    """What to measure."""

    pairs: int = 165
    """Pairs of questions, each about scenes of its own; the second ones are spread evenly over the tasks."""
    seed: int = 11
    """Seed of the pairs; the training used other ones."""
    policies: tuple[str, ...] = COMPARED
    """Compression policies that do nothing but select, with parameters or without, as for `benchmarks.quality`."""
    retentions: tuple[float, ...] = (0.2, 0.1, 0.05)
    """Kept shares, each in (0, 1)."""
    tasks: tuple[str, ...] = TASKS
    """Tasks of the second questions."""
    model: str = str(CHECKPOINT)
    """Checkpoint directory or hub id; questions are about the bundled model's kind of images."""
    dtype: Dtype = "auto"
    """Precision of weights and KV; auto is bfloat16 on a GPU or an AMX machine, else float32."""
    threads: int = 1
    """torch threads; more than there are idle cores is far slower than one."""
    max_new_tokens: int = 64
    """Longest answer, in tokens; at least 2."""
    batch: int = 128
    """Sequences of one decode step."""
    kv_memory_mib: int = 512
    """Memory for the KV of the batch, MiB."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown:
            raise ValueError(f"unknown tasks {sorted(unknown)}; known: {', '.join(TASKS)}")
        if self.pairs < max(1, len(self.tasks)):
            raise ValueError("at least one pair per task is needed")
        if self.max_new_tokens < 2:
            raise ValueError("a single token is never touched by compression; max_new_tokens must be at least 2")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")
        self._check_settings()

    def _check_settings(self) -> None:
        try:
            if not (self.contenders and self.budgets):
                raise ValueError("at least one policy and one retention are needed")
        except InvalidRequestError as error:
            raise ValueError(error.message) from error
        if 1 in self.retentions:
            raise ValueError("the full cache is always measured; retentions must be below 1")
        for label in self.policies:
            kind = POLICIES.get(label.partition(":")[0])
            if kind is None or not only_selects(kind):
                raise ValueError(f"{label} does not only select: what it keeps is for no other question")

    @cached_property
    def contenders(self) -> tuple[Contender, ...]:
        """The policies, read."""
        return contenders_of(self.policies)

    @property
    def settings(self) -> list[Setting]:
        """What is measured beside the full cache."""
        return [Setting(contender.label, kept) for contender in self.contenders for kept in self.budgets]

    @cached_property
    def budgets(self) -> dict[float, Budget]:
        """One per retention."""
        return {retention: Budget(retention=retention) for retention in self.retentions}
