"""Only the text passes where the images before it are known: the same answers and parcels, never another's images."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.compression.policies.expected_attention import ExpectedAttention
from prefill_worker.compression.policies.h2o import H2O
from prefill_worker.compression.policies.look_ahead import LookAheadPolicy
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.streaming_llm import StreamingLLM
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.engine.prefix import prefix_tokens
from prefill_worker.job import Event, PrefillJob
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import RequestCancelledError
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.request.params import Budget, Guard, Wire
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import LAYERS, processor, tokenizer
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, message, picture, user

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
# longer than the last queries that the wire stage looks at
OTHER_QUESTION = "Is the green square left of the blue one, or right of it? Answer yes or no, in one word, please."


def asked(builder: PromptBuilder, *images: int, question: str = QUESTION, tenant: str = "") -> Prompt:
    files = [encoded(picture(seed)) for seed in images]
    return built(builder, user(*files, question), tenant=tenant)


def built(builder: PromptBuilder, *messages: pb.Message, tenant: str = "") -> Prompt:
    return builder.build(messages, max_new_tokens=1, tenant=tenant)


@pytest.fixture
def keeps(engine: PrefillEngine) -> PrefillEngine:
    return PrefillEngine(engine._model, prefix_cache_bytes=1 << 20)


def run(engine: PrefillEngine, prompt: Prompt) -> Prefilled:
    done = engine.prefill(prompt, (), threading.Event())
    engine.prefixes.check_integrity()
    engine.features.check_integrity()
    return done


def assert_close(found: Prefilled, wanted: Prefilled) -> None:
    torch.testing.assert_close(found.logits, wanted.logits, **CLOSE)
    for one, other in zip((*found.keys, *found.values), (*wanted.keys, *wanted.values), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("images", [(1,), (1, 2), (2, 2)])
def test_another_question_passes_alone_with_the_same_outcome(
    engine: PrefillEngine, keeps: PrefillEngine, builder: PromptBuilder, images: tuple[int, ...]
) -> None:
    first = run(keeps, asked(builder, *images))
    other = asked(builder, *images, question=OTHER_QUESTION)
    found = run(keeps, other)
    assert first.known_tokens == 0
    assert (found.known_tokens, found.known_images) == (prefix_tokens(other.shape), len(images))
    assert_close(found, run(engine, other))
    begin = slice(found.known_tokens)
    for kept, whole in zip((*found.keys, *found.values), (*first.keys, *first.values), strict=True):
        assert torch.equal(kept[:, begin], whole[:, begin]), "the very same rows"
    assert found.peak_kv_bytes == sum(tensor.nbytes for tensor in (*found.keys, *found.values))


def test_what_is_kept_stays_as_it_is(keeps: PrefillEngine, builder: PromptBuilder) -> None:
    """Nobody writes to it: the tenth question is answered as the second."""
    run(keeps, asked(builder, 1))
    first, *others = (run(keeps, asked(builder, 1, question=OTHER_QUESTION)) for _ in range(4))
    for other in others:
        assert torch.equal(first.logits, other.logits)
        assert all(torch.equal(one, again) for one, again in zip(first.keys, other.keys, strict=True))


def test_a_conversation_is_known_up_to_its_last_image(
    engine: PrefillEngine, keeps: PrefillEngine, builder: PromptBuilder
) -> None:
    image, system = encoded(picture(1)), message("system", "Be brief.")
    run(keeps, built(builder, system, user(image, "How many?")))
    longer = built(builder, system, user(image, "How many?"), message("assistant", "Two."), user("Which ones?"))
    found = run(keeps, longer)
    assert found.known_tokens == prefix_tokens(longer.shape)
    assert_close(found, run(engine, longer))


@pytest.mark.parametrize("change", ["image", "order", "tenant", "system", "no image", "text alone"])
def test_what_differs_before_the_question_is_not_taken_for_known(
    engine: PrefillEngine, keeps: PrefillEngine, builder: PromptBuilder, change: str
) -> None:
    one, two = encoded(picture(1)), encoded(picture(2))
    run(keeps, built(builder, message("system", "Be brief."), user("Look:", one, two, QUESTION), tenant="a"))
    brief = message("system", "Be brief.")
    prompts = {
        "image": lambda: built(builder, brief, user("Look:", one, encoded(picture(3)), QUESTION), tenant="a"),
        "order": lambda: built(builder, brief, user("Look:", two, one, QUESTION), tenant="a"),
        "tenant": lambda: built(builder, brief, user("Look:", one, two, QUESTION), tenant="b"),
        "system": lambda: built(builder, message("system", "Be exact."), user("Look:", one, two, QUESTION), tenant="a"),
        "no image": lambda: built(builder, brief, user("Look:", one, QUESTION), tenant="a"),
        "text alone": lambda: built(builder, brief, user("Look:", QUESTION), tenant="a"),
    }
    prompt = prompts[change]()
    found = run(keeps, prompt)
    assert found.known_tokens == 0
    assert_close(found, run(engine, prompt))


def test_an_image_that_comes_last_is_passed_whole(
    engine: PrefillEngine, keeps: PrefillEngine, builder: PromptBuilder
) -> None:
    """Attention of a single query would see no mask."""
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    last = PromptBuilder(processor(template), builder._spec, max_images=1)
    for text in ("Look:", "Look again:"):
        prompt = built(last, user(text, encoded(picture(1))))
        assert prefix_tokens(prompt.shape) == 0
        assert run(keeps, prompt).known_tokens == 0
    assert keeps.prefixes.used_bytes == 0


def test_memory_is_bounded_and_the_oldest_leaves(
    engine: PrefillEngine, keeps: PrefillEngine, builder: PromptBuilder
) -> None:
    run(keeps, asked(builder, 1))
    each = keeps.prefixes.used_bytes
    assert each > 0
    small = PrefillEngine(engine._model, prefix_cache_bytes=int(2.5 * each))
    known = [run(small, asked(builder, image)).known_tokens > 0 for image in (1, 2, 1, 3, 1, 2, 3)]
    assert known == [False, False, True, False, True, False, False]
    assert small.prefixes.used_bytes == 2 * each


def test_a_cancelled_pass_keeps_nothing(keeps: PrefillEngine, builder: PromptBuilder) -> None:
    class Late(threading.Event):
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 3

    with pytest.raises(RequestCancelledError):
        keeps.prefill(asked(builder, 1), (), Late())
    assert keeps.prefixes.used_bytes == 0


def compute_of(engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path, **options: bool) -> PrefillCompute:
    identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
    metrics = PrefillMetrics(worker="p", model="tiny")
    return PrefillCompute(engine, tokenizer(), builder._spec, identity, metrics, **options)


def parcel(compute: PrefillCompute, job: PrefillJob, prompt: Prompt) -> tuple[Manifest, np.ndarray, list[Event]]:
    events: list[Event] = []
    body = memoryview(bytearray(1 << 20))
    complete = compute.run(job, prompt, body, events.append, lambda _: memoryview(bytearray(1 << 20)))
    assert complete is not None
    manifest = complete()
    return manifest, np.frombuffer(body[: manifest.body_bytes], np.uint8), events


SUFFICING: list[tuple[Policy, dict[str, object]]] = [
    (VLCache(), {}),
    (VLCache(shared_heads=False), {}),
    (VLCache(), {"budget": Budget(retention=1.0)}),
    (VLCache(), {"wire": Wire(key_channels=0.5)}),
    (VLCache(), {"explain": True}),
    (VLCache(), {"guard": Guard(max_dropped_attention=0.05)}),
    (LookAheadPolicy(), {}),
    (StreamingLLM(), {}),
]


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize(("policy", "changes"), SUFFICING)
def test_parcels_hold_the_same_tokens(
    engine: PrefillEngine,
    keeps: PrefillEngine,
    builder: PromptBuilder,
    checkpoint: Path,
    policy: Policy,
    changes: dict[str, object],
    cascade: bool,
) -> None:
    plain, known = (compute_of(each, builder, checkpoint, cascade=cascade) for each in (engine, keeps))
    values = {"budget": Budget(retention=0.3), "policy": policy, **changes}
    job = replace(plain_job(), sampling=Sampling(max_new_tokens=30, ignore_eos=True), **values)
    parcel(known, job, asked(builder, 1, 2))
    prompt = asked(builder, 1, 2, question=OTHER_QUESTION)
    wanted, wanted_body, wanted_events = parcel(plain, job, prompt)
    found, body, events = parcel(known, job, prompt)
    assert known._metrics.prefix_cache_hits._value.get() == 1
    assert (found.num_kept, found.generated, found.kept_tokens) == (
        wanted.num_kept,
        wanted.generated,
        wanted.kept_tokens,
    )
    assert [type(event) for event in events] == [type(event) for event in wanted_events]
    if not found.encoding:
        np.testing.assert_allclose(body.view(np.float32), wanted_body.view(np.float32), **CLOSE)


@pytest.mark.parametrize("policy", [SnapKV(window=48), ExpectedAttention(), H2O()])
def test_a_policy_that_looks_further_back_gets_a_whole_pass(
    engine: PrefillEngine, keeps: PrefillEngine, builder: PromptBuilder, checkpoint: Path, policy: Policy
) -> None:
    plain, known = (compute_of(each, builder, checkpoint) for each in (engine, keeps))
    job = replace(plain_job(), budget=Budget(retention=0.3), policy=policy)
    prompt = asked(builder, 1)
    run(keeps, prompt)
    wanted, wanted_body, _ = parcel(plain, job, prompt)
    found, body, _ = parcel(known, job, prompt)
    assert known._metrics.prefix_cache_hits._value.get() == 0
    assert known._metrics.prefix_cache_misses._value.get() == 1
    assert found.num_kept == wanted.num_kept
    assert np.array_equal(body, wanted_body)


def test_missing_queries_can_not_be_mistaken_for_numbers(
    keeps: PrefillEngine, builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statistic that claims too little would be found out at once."""
    statistics = H2O().needs(asked(builder, 1).shape)
    run(keeps, asked(builder, 1))
    for statistic in statistics:
        monkeypatch.setattr(type(statistic), "first_row", lambda *_: 1 << 20)
    found = keeps.prefill(asked(builder, 1), statistics, threading.Event())
    assert found.known_tokens > 0
    assert len(found.measured) == LAYERS
    assert all(bool(torch.isnan(value).any()) for layer in found.measured for value in layer.values())
