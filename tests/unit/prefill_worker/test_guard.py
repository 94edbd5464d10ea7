"""The quality guard: what it measures, how far it grows, and what it says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.pipeline import Selection
from prefill_worker.compression.policies.fast_v import FastV
from prefill_worker.compression.policies.look_ahead import LookAheadPolicy
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.guard import dropped_attention, larger_budgets
from prefill_worker.job import Compressed, Event, NextToken, PrefillJob
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import InvalidRequestError
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.request.params import Budget, BudgetScope, Guard
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import KV_HEADS, LAYERS, tokenizer
from tests.unit.prefill_worker.compression.observing import prompt_shape
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user
from tests.unit.prefill_worker.sharing import sharer, sharing

POLICY = VLCache(min_tokens=4)
ROOM = 1 << 20


class Run:
    """One guarded job on the tiny model: what it asked for, and what came of it."""

    def __init__(self, compute: PrefillCompute, prompt: Prompt, work: PrefillJob, *, granted: bool = True) -> None:
        self.asked: list[Budget] = []
        self.small, self.large = memoryview(bytearray(ROOM)), memoryview(bytearray(ROOM))
        self.events: list[Event] = []
        self._granted = granted
        complete = compute.run(work, prompt, self.small, self.events.append, self._more_room)
        assert complete is not None
        self.manifest: Manifest = complete()
        (self.report,) = [event.message for event in self.events if isinstance(event, Compressed)]

    def body(self, room: memoryview) -> memoryview:
        return room[: self.manifest.body_bytes]

    def _more_room(self, budget: Budget) -> memoryview | None:
        self.asked.append(budget)
        return self.large if self._granted else None


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    return builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=1)


@pytest.fixture(params=[False, True], ids=["whole", "cascade"])
def compute(
    engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path, request: pytest.FixtureRequest
) -> PrefillCompute:
    """A worker that cascades keeps whole what may have to grow."""
    identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
    metrics = PrefillMetrics(worker="p", model="tiny")
    return PrefillCompute(engine, tokenizer(), builder._spec, identity, metrics, cascade=request.param)


def job(limit: float, retention: float = 0.2, policy: Any = POLICY) -> PrefillJob:
    return dataclasses.replace(
        plain_job(),
        sampling=Sampling(max_new_tokens=12, ignore_eos=True),
        budget=Budget(retention=retention),
        policy=policy,
        guard=Guard(max_dropped_attention=limit),
    )


def counted(compute: PrefillCompute) -> dict[str, float]:
    (metric,) = compute._metrics.guard.collect()
    counts = {each.labels["outcome"]: each.value for each in metric.samples if each.name.endswith("_total")}
    return {outcome: count for outcome, count in counts.items() if count}


def test_the_largest_weight_on_a_dropped_token_counts_mean_over_layers() -> None:
    peaks = [torch.tensor([[0.9, 0.2, 0.1], [0.3, 0.4, 0.5]]), torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.6, 0.1]])]
    first = torch.tensor([[True, False, True], [True, True, False]])
    second = torch.tensor([[False, False, False], [False, True, False]])
    selections = [Selection(chosen=chosen, attention_mass=0.0) for chosen in (first, second)]
    assert dropped_attention(selections, peaks) == pytest.approx((0.5 + 0.1) / 2)
    everything = Selection(chosen=None, attention_mass=1.0)
    assert dropped_attention([selections[0], everything], peaks) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("asked", "shares"),
    [
        (Budget(retention=0.1), [0.2, 1.0]),
        (Budget(retention=0.5), [1.0]),
        (Budget(retention=0.9), [1.0]),
        (Budget(max_kept_tokens=10), [0.5, 1.0]),
    ],
)
def test_budgets_grow_to_twice_and_to_everything(asked: Budget, shares: list[float]) -> None:
    assert [budget.retention for budget in larger_budgets(asked, prompt_shape(40))] == shares


def test_a_budget_of_visual_tokens_grows_within_its_scope() -> None:
    asked = Budget(retention=0.3, scope=BudgetScope.VISUAL)
    shape = prompt_shape(40, (4, 20))
    assert [each.scope for each in larger_budgets(asked, shape)] == [BudgetScope.VISUAL] * 2


def test_without_a_limit_nothing_is_drafted_and_nothing_is_said(compute: PrefillCompute, prompt: Prompt) -> None:
    plain = Run(compute, prompt, job(1.0))
    assert (plain.asked, plain.report.guard, counted(compute)) == ([], public.GUARD_OUTCOME_UNSPECIFIED, {})


def test_a_limit_that_is_met_changes_nothing(compute: PrefillCompute, prompt: Prompt) -> None:
    plain, guarded = Run(compute, prompt, job(1.0)), Run(compute, prompt, job(0.999999))
    assert guarded.asked == []
    assert (guarded.manifest, guarded.body(guarded.small)) == (plain.manifest, plain.body(plain.small))
    assert guarded.report.guard == public.GUARD_OUTCOME_KEPT
    assert counted(compute) == {"kept": 1}


def limit_between(compute: PrefillCompute, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> float:
    """A limit that 0.2 misses and 0.4 meets."""
    seen: list[float] = []

    def spy(selections: list[Selection], peaks: list[torch.Tensor]) -> float:
        seen.append(dropped_attention(selections, peaks))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr("prefill_worker.guard.dropped_attention", spy)
        Run(compute, prompt, job(0.0))
    at_asked, at_twice = seen
    assert 0 < at_twice < at_asked
    return (at_twice + at_asked) / 2


def test_it_grows_to_what_the_larger_budget_gives_and_uses_its_room(
    compute: PrefillCompute, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = limit_between(compute, prompt, monkeypatch)
    grown, larger = Run(compute, prompt, job(limit)), Run(compute, prompt, job(1.0, retention=0.4))
    assert grown.asked == [Budget(retention=0.4)]
    assert grown.manifest == larger.manifest
    assert grown.body(grown.large) == larger.body(larger.small)
    assert grown.report.guard == public.GUARD_OUTCOME_GROWN
    assert grown.report.requested_retention == 0.4
    assert counted(compute) == {"full": 1, "grown": 1}


def test_the_strictest_limit_keeps_everything(compute: PrefillCompute, prompt: Prompt) -> None:
    full = Run(compute, prompt, job(0.0))
    assert full.asked == [Budget(retention=1.0)]
    assert set(full.manifest.num_kept) == {prompt.shape.num_tokens}
    assert full.body(full.large) == Run(compute, prompt, job(1.0, retention=1.0)).small[: full.manifest.body_bytes]
    assert (full.report.guard, full.report.realised_retention) == (public.GUARD_OUTCOME_FULL, 1.0)


def test_what_is_refused_stays_as_it_was(compute: PrefillCompute, prompt: Prompt) -> None:
    plain, refused = Run(compute, prompt, job(1.0)), Run(compute, prompt, job(0.0), granted=False)
    assert refused.asked == [Budget(retention=1.0)]
    assert (refused.manifest, refused.body(refused.small)) == (plain.manifest, plain.body(plain.small))
    assert refused.report.guard == public.GUARD_OUTCOME_REFUSED
    assert counted(compute) == {"refused": 1}


def test_retention_one_has_nothing_to_guard(compute: PrefillCompute, prompt: Prompt) -> None:
    full = Run(compute, prompt, job(0.0, retention=1.0))
    assert (full.asked, full.report.guard) == ([], public.GUARD_OUTCOME_KEPT)


def test_drafts_for_the_guard_are_nobodys_answer(compute: PrefillCompute, prompt: Prompt) -> None:
    guarded = Run(compute, prompt, job(0.0))
    assert not any(isinstance(event, NextToken) for event in guarded.events)
    assert len(guarded.manifest.generated) == 1


def test_tokens_that_were_decoded_ahead_stay_when_everything_is_kept(compute: PrefillCompute, prompt: Prompt) -> None:
    policy = LookAheadPolicy(tokens=3)
    full = Run(compute, prompt, job(0.0, policy=policy))
    full.manifest.check()
    assert len(full.manifest.generated) == 4
    assert set(full.manifest.num_kept) == {prompt.shape.num_tokens + 3}
    assert len(full.manifest.num_kept) == LAYERS * KV_HEADS


def test_what_a_sparse_pass_has_dropped_cannot_be_kept(compute: PrefillCompute, prompt: Prompt) -> None:
    sparse = Run(compute, prompt, job(0.5, policy=FastV(layer=1)))
    assert (sparse.asked, sparse.report.guard) == ([], public.GUARD_OUTCOME_REFUSED)


def test_nor_what_layers_without_kv_of_their_own_never_had(compute: PrefillCompute, prompt: Prompt) -> None:
    shared = Run(compute, prompt, job(0.5, policy=sharer((2, 0))))
    assert (shared.asked, shared.report.guard) == ([], public.GUARD_OUTCOME_REFUSED)
    assert shared.manifest.num_kept[-KV_HEADS:] == (0,) * KV_HEADS


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("limit", [0.0, 0.02])
def test_every_policy_may_be_guarded(compute: PrefillCompute, prompt: Prompt, name: str, limit: float) -> None:
    policy = build_policy(name, {}).for_checkpoint(sharing((2, 0)))
    guarded = Run(compute, prompt, job(limit, policy=policy))
    guarded.manifest.check()
    body = guarded.body(guarded.large if guarded.asked else guarded.small)
    guarded.manifest.check_digest(body)
    everything = guarded.report.guard == public.GUARD_OUTCOME_FULL
    assert guarded.report.guard != public.GUARD_OUTCOME_UNSPECIFIED
    assert everything == (guarded.manifest.realised_retention == 1)


@pytest.mark.parametrize("limit", [-0.1, 1.1, float("nan")])
def test_a_limit_is_a_weight(limit: float) -> None:
    with pytest.raises(InvalidRequestError, match="max_dropped_attention"):
        Guard(max_dropped_attention=limit)


def test_a_request_overrides_the_workers_default() -> None:
    absent, given = public.CompressionParams(), public.CompressionParams(max_dropped_attention=1.0)
    assert Guard.from_proto(absent, default=0.03).on
    assert not Guard.from_proto(given, default=0.03).on
