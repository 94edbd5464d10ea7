"""The quality guard: where the answer's first tokens look at what would be dropped, more is kept.

How much attention is kept in all says little: most heads spread theirs over tokens that change nothing, and the kept
share is as high for wrong answers as for right ones. What tells them apart is a single strong look at a dropped token:

    dropped = mean over layers of max over (answer tokens i, heads h, tokens j that h's KV head drops) of A_hij

The answer's tokens are those of a policy that looks ahead; else they are drafted for the guard alone. Where `dropped`
exceeds the limit, twice as much is kept, then everything: the statistics are there, no second pass is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.pipeline import Selection, asked_retention, keep_everything, select_tokens
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.engine.engine import Prefilled
from prefill_worker.job import PrefillJob
from shared.request.params import Budget

# Answer tokens that are drafted for the guard where the policy itself does not look ahead.
GUARD_TOKENS = 8

MoreRoom = Callable[[Budget], memoryview | None]
"""Asked in the model thread for room for a larger budget, here and at the decode worker; None where it is refused."""


def no_more_room(budget: Budget) -> memoryview | None:
    """Refuses."""
    return None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is kept: by which budget, written where, and what the guard did."""

    budget: Budget
    selections: list[Selection]
    body: memoryview
    outcome: public.GuardOutcome = public.GUARD_OUTCOME_UNSPECIFIED


def choose(
    job: PrefillJob,
    prompt: PromptShape,
    prefilled: Prefilled,
    body: memoryview,
    more_room: MoreRoom,
    windows: Sequence[int] = (),
) -> Choice:
    """The budget's own choice, or what its guard makes of it.

    Args:
        prefilled: A pass that has looked ahead where the guard is on, unless it has no full KV.
        body: Room for what the budget keeps.
        windows: See `select_tokens`.
    """
    asked = Choice(budget=job.budget, selections=_select(job, prompt, prefilled, job.budget, windows), body=body)
    if not job.guard.on:
        return asked
    if _is_enough(job, prefilled, asked.selections):
        return replace(asked, outcome=public.GUARD_OUTCOME_KEPT)
    larger = _larger(job, prompt, prefilled, more_room, windows) if prefilled.has_full_kv else None
    return larger or replace(asked, outcome=public.GUARD_OUTCOME_REFUSED)


def dropped_attention(selections: Sequence[Selection], peaks: Sequence[torch.Tensor]) -> float:
    """The largest weight on a dropped token, mean over layers.

    Args:
        peaks: Per layer [num_kv_heads, num_tokens], see `LookAhead`.
    """
    layers = zip(selections, peaks, strict=True)
    return fmean(0.0 if each.chosen is None else float((peak * ~each.chosen).max()) for each, peak in layers)


def larger_budgets(asked: Budget, prompt: PromptShape) -> Iterator[Budget]:
    """Twice as much, then everything."""
    twice = 2 * asked_retention(prompt, asked)
    if twice < 1:
        yield Budget(retention=float(twice), scope=asked.scope)
    yield Budget(retention=1.0, scope=asked.scope)


def outcome_name(outcome: public.GuardOutcome) -> str:
    """As metrics say it."""
    return public.GuardOutcome.Name(outcome).removeprefix("GUARD_OUTCOME_").lower()


def _larger(
    job: PrefillJob, prompt: PromptShape, prefilled: Prefilled, more_room: MoreRoom, windows: Sequence[int]
) -> Choice | None:
    """The first larger budget that is enough; None where there is no room for it."""
    for budget in larger_budgets(job.budget, prompt):
        selections = _select(job, prompt, prefilled, budget, windows)
        if _is_enough(job, prefilled, selections):
            if (body := more_room(budget)) is None:
                return None
            everything = asked_retention(prompt, budget) >= 1
            outcome = public.GUARD_OUTCOME_FULL if everything else public.GUARD_OUTCOME_GROWN
            return Choice(budget=budget, selections=selections, body=body, outcome=outcome)
    raise AssertionError("everything is always enough")


def _select(
    job: PrefillJob, prompt: PromptShape, prefilled: Prefilled, budget: Budget, windows: Sequence[int]
) -> list[Selection]:
    if asked_retention(prompt, budget) >= 1:
        return keep_everything(len(prefilled.keys))
    return select_tokens(job.policy, prefilled.observed(prompt), budget, windows)


def _is_enough(job: PrefillJob, prefilled: Prefilled, selections: Sequence[Selection]) -> bool:
    if all(each.chosen is None for each in selections):
        return True
    dropped = dropped_attention(selections, prefilled.peaks) if prefilled.peaks else 1.0
    return dropped <= job.guard.max_dropped_attention
