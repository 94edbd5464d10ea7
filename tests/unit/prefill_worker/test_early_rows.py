"""Rows that leave while the pass goes on are rows of the parcel, and the parcel is what it is without."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefill_worker.compression.eviction import parcel_bound
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import Event, PrefillJob
from prefill_worker.parcel import early_rows
from prefill_worker.parcel.early_rows import Early
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import RequestCancelledError
from shared.kv.manifest import Manifest
from shared.kv.waves import LAST_WAVE
from shared.model.identity import ModelIdentity
from shared.model.loading import load_spec
from shared.model.wave_order import in_body_order, last_wave
from shared.request.params import Budget, BudgetScope, Guard, Wire
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import tokenizer
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

MONOTONE = [build_policy(name, {}) for name, kind in POLICIES.items() if kind.monotone]
MONOTONE += [VLCache(budget="paper"), VLCache(shared_heads=False)]


class Collected:
    """Takes waves, and looks at each of them only in the end."""

    def __init__(self) -> None:
        self.pieces: list[Callable[[], memoryview]] = []
        self.numbers = b""

    def add(self, piece: Callable[[], memoryview]) -> None:
        self.pieces.append(piece)

    def placed(self, waves: bytes) -> None:
        assert not self.numbers
        self.numbers = waves


class Runs:
    """A compute that cascades, with somebody to take waves or with nobody."""

    def __init__(self, engine: PrefillEngine, checkpoint: Path) -> None:
        spec = load_spec(checkpoint, torch.float32)
        identity = ModelIdentity.of("tiny", checkpoint, spec)
        metrics = PrefillMetrics(worker="p", model="tiny")
        self.compute = PrefillCompute(engine, tokenizer(), spec, identity, metrics, cascade=True)
        self._layout = spec.layout

    def __call__(self, work: PrefillJob, prompt: Prompt, early: Early | None) -> tuple[Manifest, bytes, list[Event]]:
        bound = work.rows_bound(prompt.shape.num_tokens - prompt.shape.num_visual, prompt.shape.num_visual)
        body, events = memoryview(bytearray(parcel_bound(work.policy, self._layout, bound))), list[Event]()
        complete = self.compute.run(work, prompt, body, events.append, early=early)
        assert complete is not None
        manifest = complete()
        return manifest, bytes(body[: manifest.body_bytes]), events

    def assert_alike(self, work: PrefillJob, prompt: Prompt) -> Collected:
        """With waves, the parcel is the same, and it can be put together from them."""
        early = Collected()
        (manifest, body, events), plain = self(work, prompt, early), self(work, prompt, None)
        assert (manifest, body, events) == plain
        if early.pieces:
            rest = last_wave(memoryview(body), manifest.layout, manifest.num_kept, early.numbers)
            rows = b"".join([*(piece() for piece in early.pieces), rest])
            travelled = rows + body[manifest.kv_bytes :] + early.numbers
            assert bytes(in_body_order(manifest, memoryview(travelled))) == body
        return early


@pytest.fixture(scope="module")
def runs(engine: PrefillEngine, checkpoint: Path) -> Runs:
    return Runs(engine, checkpoint)


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    images = [encoded(picture(seed)) for seed in (1, 2, 3)]
    return builder.build([user(*images, QUESTION)], max_new_tokens=1)


@pytest.fixture(autouse=True)
def _every_row_is_a_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_rows, "MIN_WAVE_BYTES", 1)


def job(policy: Policy, budget: Budget, **changes: Any) -> PrefillJob:
    sampling = Sampling(max_new_tokens=32, ignore_eos=True)
    return dataclasses.replace(plain_job(), sampling=sampling, budget=budget, policy=policy, **changes)


@pytest.mark.parametrize("policy", MONOTONE, ids=lambda policy: repr(policy)[:60])
@pytest.mark.parametrize("scope", BudgetScope)
def test_every_monotone_policy(runs: Runs, prompt: Prompt, policy: Policy, scope: BudgetScope) -> None:
    for retention in (0.1, 0.4):
        early = runs.assert_alike(job(policy, Budget(retention=retention, scope=scope)), prompt)
        # one per layer at most, and none for the last, with which all the rest leaves
        assert len(early.pieces) == 2
        assert set(early.numbers) == {0, 1, LAST_WAVE}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from(MONOTONE),
    words=st.lists(st.sampled_from(("red", "circle", "left", "how", "many", "?")), min_size=1, max_size=60),
    pictures=st.integers(0, 2),
    kept=st.integers(1, 80),
    scope=st.sampled_from(BudgetScope),
)
def test_random_prompts(
    runs: Runs,
    builder: PromptBuilder,
    policy: Policy,
    words: list[str],
    pictures: int,
    kept: int,
    scope: BudgetScope,
) -> None:
    parts = [*(encoded(picture(seed)) for seed in range(pictures)), " ".join(words)]
    prompt = builder.build([user(*parts)], max_new_tokens=1)
    runs.assert_alike(job(policy, Budget(max_kept_tokens=kept, scope=scope)), prompt)


def test_an_explained_parcel_leaves_early_too(runs: Runs, prompt: Prompt) -> None:
    work = job(VLCache(), Budget(retention=0.3), explain=True)
    assert runs.assert_alike(work, prompt).pieces


@pytest.mark.parametrize(
    "work",
    [
        job(VLCache(), Budget(retention=1.0)),
        job(VLCache(), Budget(retention=0.2), wire=Wire(bits=4, group=8)),
        job(VLCache(), Budget(retention=0.2), guard=Guard(max_dropped_attention=0.1)),
        job(build_policy("cake", {}), Budget(retention=0.2)),
        job(build_policy("look_m", {}), Budget(retention=0.2)),
        job(build_policy("look_ahead", {}), Budget(retention=0.2)),
        job(build_policy("fast_v", {}), Budget(retention=0.2)),
    ],
    ids=["everything", "fewer bytes", "guard", "budgets that grow", "merging", "look-ahead", "its own pass"],
)
def test_where_nothing_is_certain_nothing_leaves(runs: Runs, prompt: Prompt, work: PrefillJob) -> None:
    early = runs.assert_alike(work, prompt)
    assert (early.pieces, early.numbers) == ([], b"")


def test_a_wave_waits_until_it_is_worth_it(runs: Runs, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    work = job(VLCache(budget="uniform"), Budget(retention=0.4))
    first, second = (len(piece()) for piece in runs.assert_alike(work, prompt).pieces)
    assert first == second
    monkeypatch.setattr(early_rows, "MIN_WAVE_BYTES", first + 1)
    (both,) = runs.assert_alike(work, prompt).pieces
    assert len(both()) == first + second
    monkeypatch.setattr(early_rows, "MIN_WAVE_BYTES", first + second + 1)
    early = runs.assert_alike(work, prompt)
    assert (early.pieces, early.numbers) == ([], b"")


def test_waves_outlive_what_the_cascade_cuts(runs: Runs, prompt: Prompt) -> None:
    """Bytes are those of the moment when the wave left, however late somebody asks for them."""
    early = Collected()
    manifest, body, _ = runs(job(VLCache(min_tokens=4), Budget(retention=0.1)), prompt, early)
    seen = [bytes(piece()) for piece in early.pieces]
    runs(job(VLCache(min_tokens=4), Budget(retention=0.3)), prompt, Collected())
    assert [bytes(piece()) for piece in early.pieces] == seen
    assert len(b"".join(seen)) < manifest.kv_bytes == len(body)


def test_more_waves_than_numbers(runs: Runs, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_rows, "LAST_WAVE", 1)
    early = Collected()
    runs(job(VLCache(), Budget(retention=0.3)), prompt, early)
    assert len(early.pieces) == 1
    assert set(early.numbers) == {0, 1}


def test_a_cancelled_pass_is_not_placed(runs: Runs, prompt: Prompt) -> None:
    cancelled = threading.Event()

    class Cancelling(Collected):
        """Departs with the first wave."""

        def add(self, piece: Callable[[], memoryview]) -> None:
            super().add(piece)
            cancelled.set()

    early = Cancelling()
    with pytest.raises(RequestCancelledError, match="before layer 1"):
        runs(job(VLCache(), Budget(retention=0.3), cancelled=cancelled), prompt, early)
    assert len(early.pieces) == 1
    assert early.numbers == b""


def test_an_answer_of_one_token_is_not_placed(runs: Runs, prompt: Prompt) -> None:
    early, work = Collected(), job(VLCache(), Budget(retention=0.3))
    one = dataclasses.replace(work, sampling=Sampling(max_new_tokens=1))
    assert runs.compute.run(one, prompt, memoryview(bytearray(1 << 20)), list[Event]().append, early=early) is None
    assert early.pieces
    assert early.numbers == b""
