"""A prefill that drops KV on the way ships what one that holds it all to the end ships, byte for byte."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.eviction import parcel_bound
from prefill_worker.compression.pipeline import statistics_for
from prefill_worker.compression.policies.air_cache import AirCache
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.compression.statistics import ObservedLayer
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine import engine as prefill_engine
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.engine.prompt_cache import PromptCache
from prefill_worker.job import Event, PrefillJob
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import RequestCancelledError
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.request.params import Budget, BudgetScope, Guard, Wire
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import LAYERS, tokenizer
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

MONOTONE = [build_policy(name, {}) for name, kind in POLICIES.items() if kind.monotone]
SCOPES = [BudgetScope.CACHE, BudgetScope.VISUAL]


class Halves:
    """The same compute with and without a cascade."""

    def __init__(self, engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> None:
        identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
        parts = (engine, tokenizer(), builder._spec, identity, PrefillMetrics(worker="p", model="tiny"))
        self.plain, self.cascading = PrefillCompute(*parts), PrefillCompute(*parts, cascade=True)
        self._layout = builder._spec.layout

    def assert_alike(self, work: PrefillJob, prompt: Prompt) -> Manifest:
        one, other = (self._run(compute, work, prompt) for compute in (self.plain, self.cascading))
        assert one == other
        return one[0]

    def _run(self, compute: PrefillCompute, work: PrefillJob, prompt: Prompt) -> tuple[Manifest, bytes, list[Event]]:
        bound = work.rows_bound(prompt.shape.num_tokens - prompt.shape.num_visual, prompt.shape.num_visual)
        body, events = memoryview(bytearray(parcel_bound(work.policy, self._layout, bound))), list[Event]()
        complete = compute.run(work, prompt, body, events.append)
        assert complete is not None
        manifest = complete()
        return manifest, bytes(body[: manifest.body_bytes]), events


@pytest.fixture(scope="module")
def halves(engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> Halves:
    return Halves(engine, builder, checkpoint)


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    images = [encoded(picture(seed)) for seed in (1, 2, 3)]
    return builder.build([user(*images, QUESTION)], max_new_tokens=1)


def job(policy: Policy, budget: Budget, **changes: Any) -> PrefillJob:
    sampling = Sampling(max_new_tokens=8, ignore_eos=True)
    return dataclasses.replace(plain_job(), sampling=sampling, budget=budget, policy=policy, **changes)


def passed(engine: PrefillEngine, prompt: Prompt, policy: Policy, retention: float) -> Prefilled:
    cascade = Cascade(policy, prompt.shape, Budget(retention=retention), LAYERS)
    return engine.prefill(prompt, statistics_for(policy, prompt.shape), threading.Event(), cascade=cascade)


@pytest.mark.parametrize("policy", MONOTONE, ids=lambda policy: policy.name)
@pytest.mark.parametrize("scope", SCOPES)
def test_parcels_are_alike(halves: Halves, prompt: Prompt, policy: Policy, scope: BudgetScope) -> None:
    for retention in (0.1, 0.4):
        manifest = halves.assert_alike(job(policy, Budget(retention=retention, scope=scope)), prompt)
        assert manifest.realised_retention < 1
        assert (manifest.eviction is not None) == (
            policy.name in ("h2o", "scope", "tgv_kv", "prefix_kv", "tidal_decode")
        )


@pytest.mark.parametrize("wire", [Wire(bits=4, group=8), Wire(bits=2, key_channels=0.5, group=8, residual=4)])
@pytest.mark.parametrize("name", ["vl_cache", "ada_kv", "h2o"])
def test_fewer_bytes_on_the_wire(halves: Halves, prompt: Prompt, name: str, wire: Wire) -> None:
    manifest = halves.assert_alike(job(build_policy(name, {}), Budget(retention=0.5), wire=wire), prompt)
    assert manifest.encoding is not None


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from([*MONOTONE, AirCache()]),
    words=st.lists(st.sampled_from(("red", "circle", "left", "how", "many", "?")), min_size=1, max_size=60),
    pictures=st.integers(0, 2),
    kept=st.integers(1, 80),
    scope=st.sampled_from(SCOPES),
)
def test_random_prompts(
    halves: Halves,
    builder: PromptBuilder,
    policy: Policy,
    words: list[str],
    pictures: int,
    kept: int,
    scope: BudgetScope,
) -> None:
    parts = [*(encoded(picture(seed)) for seed in range(pictures)), " ".join(words)]
    prompt = builder.build([user(*parts)], max_new_tokens=1)
    halves.assert_alike(job(policy, Budget(max_kept_tokens=kept, scope=scope)), prompt)


def test_less_is_held(engine: PrefillEngine, prompt: Prompt) -> None:
    whole = engine.prefill(prompt, (), threading.Event())
    full = sum(tensor.nbytes for tensor in (*whole.keys, *whole.values))
    assert whole.peak_kv_bytes == full
    found = passed(engine, prompt, VLCache(min_tokens=4, budget="uniform"), 0.1)
    left = sum(tensor.untyped_storage().nbytes() for tensor in (*found.keys, *found.values))
    assert left <= 0.1 * full
    # what is kept of the layers before, a whole one, and the part of it that is there twice while it is cut
    assert found.peak_kv_bytes <= (0.1 + 1 / LAYERS) * full
    assert set(found.seconds) == {"vision_encode", "prefill", "statistics", "cascade"}


def test_the_ratio_is_measured(halves: Halves, prompt: Prompt) -> None:
    peak = halves.plain._metrics.prefill_peak._sum
    before = peak.get()
    halves.cascading.prefill([job(VLCache(budget="uniform"), Budget(retention=0.1))], prompt, threading.Event())
    assert 0 < peak.get() - before < 1
    before = peak.get()
    halves.plain.prefill([job(VLCache(budget="uniform"), Budget(retention=0.1))], prompt, threading.Event())
    assert peak.get() - before == pytest.approx(1)


@pytest.mark.parametrize(
    "jobs",
    [
        [job(VLCache(), Budget(retention=1.0))],
        [job(VLCache(), Budget(retention=0.2)), job(VLCache(), Budget(retention=0.1))],
        [job(VLCache(), Budget(retention=0.2), guard=Guard(max_dropped_attention=0.1))],
        [job(build_policy("cake", {}), Budget(retention=0.2))],
        [job(build_policy("look_m", {}), Budget(retention=0.2))],
        [job(build_policy("look_ahead", {}), Budget(retention=0.2))],
        [job(build_policy("fast_v", {}), Budget(retention=0.2))],
    ],
    ids=["everything", "two jobs", "guard", "budgets that grow", "merging", "look-ahead", "its own pass"],
)
def test_what_needs_all_kv_has_it(halves: Halves, prompt: Prompt, jobs: list[PrefillJob]) -> None:
    assert halves.cascading.prefill(jobs, prompt, threading.Event()).held == []


def test_a_cancelled_pass_leaves_nothing(
    engine: PrefillEngine, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, caches = threading.Event(), list[weakref.ref[PromptCache]]()

    class Watched(PromptCache):
        """The owner of all KV of the pass."""

        def passed(self, layer: ObservedLayer) -> None:
            super().passed(layer)
            caches.append(weakref.ref(self))
            cancelled.set()

    monkeypatch.setattr(prefill_engine, "PromptCache", Watched)
    policy = VLCache(min_tokens=4)
    cascade = Cascade(policy, prompt.shape, Budget(retention=0.1), LAYERS)
    with pytest.raises(RequestCancelledError, match="before layer 1"):
        engine.prefill(prompt, statistics_for(policy, prompt.shape), cancelled, cascade=cascade)
    gc.collect()
    assert len(caches) == 1
    assert caches[0]() is None
