"""What the quality benchmark measures, from the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Annotated, Literal

import tyro

from benchmarks.quality.contenders import Contender, contenders_of
from benchmarks.quality.setting import Setting
from models.shapes_vlm.held_out import KNOWN_TASKS
from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import TASKS
from prefill_worker.compression.registry import DEFAULT_POLICY
from shared.config import Dtype
from shared.errors import InvalidRequestError
from shared.request.params import Budget, BudgetScope, Guard


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What to measure."""

    samples: int = 550
    """Questions in all, each about a scene of its own, spread evenly over the tasks."""
    seed: int = 7
    """Seed of the questions; the training used other ones."""
    policies: tuple[str, ...] = (DEFAULT_POLICY,)
    """Compression policies, with parameters or without: `vl_cache`, `snap_kv:window=16,pooling=max`. `all` means every
    policy that the model allows, with its defaults; `oracle` knows which patches carry the answer, `oracle:base=NAME`
    tells them a policy."""
    retentions: tuple[float, ...] = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
    """Kept shares, each in (0, 1]."""
    max_dropped_attention: tuple[float, ...] = (1.0,)
    """Limits of the quality guard, each in [0, 1]; 1 is off."""
    scope: Literal["cache", "visual"] = "cache"
    """What the retention is a share of: the whole cache, or the visual tokens, all text being kept."""
    tasks: tuple[str, ...] = TASKS
    """Tasks to ask about: those of the training, or kinds that it did not see (`models/shapes_vlm/held_out.py`)."""
    model: str = str(CHECKPOINT)
    """Checkpoint directory or hub id; questions are about the bundled model's kind of images."""
    dtype: Dtype = "auto"
    """Precision of weights and KV; auto is bfloat16 on a GPU or an AMX machine, else float32."""
    threads: int = 1
    """torch threads; more than there are idle cores is far slower than one."""
    max_new_tokens: int = 64
    """Longest answer, in tokens; at least 2."""
    batch: int = 128
    """Sequences of one decode step, of any policies and retentions."""
    kv_memory_mib: int = 512
    """Memory for the KV of the batch, MiB."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(KNOWN_TASKS)
        if unknown:
            raise ValueError(f"unknown tasks {sorted(unknown)}; known: {', '.join(KNOWN_TASKS)}")
        if self.samples < len(self.tasks):
            raise ValueError("at least one sample per task is needed")
        if self.max_new_tokens < 2:
            raise ValueError("a single token is never touched by compression; max_new_tokens must be at least 2")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")
        try:
            if not (self.contenders and self.budgets and self.guards):
                raise ValueError("at least one policy, one retention and one limit of the guard are needed")
        except InvalidRequestError as error:
            raise ValueError(error.message) from error

    @cached_property
    def contenders(self) -> tuple[Contender, ...]:
        """The policies, read."""
        return contenders_of(self.policies)

    def settings(self, contenders: Iterable[Contender]) -> list[Setting]:
        """All that is compared with the full cache, of those contenders that the model allows."""
        compared = product(contenders, self.budgets, self.guards)
        return [Setting(each.label, kept, guard.max_dropped_attention) for each, kept, guard in compared]

    @cached_property
    def guards(self) -> tuple[Guard, ...]:
        """One per limit."""
        return tuple(Guard(max_dropped_attention=limit) for limit in dict.fromkeys(self.max_dropped_attention))

    @cached_property
    def budgets(self) -> dict[float, Budget]:
        """One per retention."""
        scope = BudgetScope(self.scope)
        return {retention: Budget(retention=retention, scope=scope) for retention in self.retentions}
