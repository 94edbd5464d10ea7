"""From logits to a first token and a parcel, on the tiny model."""

import dataclasses
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import select_tokens, statistics_for
from prefill_worker.compression.policies.air_cache import AirCache
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import Compressed, Event, FirstToken, PrefillJob
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import RequestCancelledError
from shared.kv.manifest import Manifest, body_digest
from shared.model.identity import ModelIdentity
from shared.model.sampler import sample
from shared.request.params import Budget, Wire
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import tokenizer
from tests.unit.prefill_worker.compression.observing import positions
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

POLICY = VLCache(min_tokens=4)
PICTURED = user(encoded(picture(1)), QUESTION)


class Computed:
    """One run: its events, manifest and body."""

    def __init__(self, compute: PrefillCompute, job: PrefillJob, prompt: Prompt, room: int) -> None:
        self.events: list[Event] = []
        buffer = memoryview(bytearray(room))
        complete = compute.run(job, prompt, buffer, self.events.append)
        self.manifest = complete() if complete else None
        self.first = self.events[0]
        assert isinstance(self.first, FirstToken)
        self.body = buffer[: self.manifest.body_bytes] if self.manifest else None


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    return builder.build([PICTURED], max_new_tokens=1)


@pytest.fixture
def compute(engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> PrefillCompute:
    identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
    metrics = PrefillMetrics(worker="p", model="tiny")
    return PrefillCompute(engine, tokenizer(), builder._spec, identity, metrics)


def job(retention: float = 0.3, **sampling: Any) -> PrefillJob:
    values = {"max_new_tokens": 8, "ignore_eos": True, **sampling}
    budget = Budget(retention=retention)
    return dataclasses.replace(plain_job(), sampling=Sampling(**values), budget=budget, policy=POLICY)


def room_for(compute: PrefillCompute, work: PrefillJob, prompt: Prompt) -> int:
    bound = work.budget.kept_tokens_bound(0, prompt.shape.num_tokens)
    return compute._identity.layout.full_bytes(bound)


def run(compute: PrefillCompute, work: PrefillJob, prompt: Prompt) -> Computed:
    return Computed(compute, work, prompt, room_for(compute, work, prompt))


def logits_of(engine: PrefillEngine, prompt: Prompt) -> torch.Tensor:
    return engine.prefill(prompt, (), threading.Event()).logits


def test_the_parcel_holds_what_the_policy_selects(
    compute: PrefillCompute, engine: PrefillEngine, prompt: Prompt
) -> None:
    done = run(compute, job(), prompt)
    made = done.manifest
    assert made is not None
    assert done.body is not None
    made.check()
    made.check_digest(done.body)
    tokens = prompt.shape.num_tokens
    assert (made.logical_length, made.next_position) == (tokens, tokens)
    assert (made.policy, made.requested_retention) == ("vl_cache", 0.3)
    layout = made.layout
    assert sum(made.num_kept) == layout.num_kv_heads * int(Fraction(3, 10) * layout.num_layers * tokens)
    assert made.realised_retention == sum(made.num_kept) / (layout.num_layers * layout.num_kv_heads * tokens)

    prefilled = engine.prefill(prompt, statistics_for(POLICY, prompt.shape), threading.Event())
    selections = select_tokens(POLICY, prefilled.observed(prompt.shape), Budget(retention=0.3))
    assert made.layer_attention_mass == tuple(chosen.attention_mass for chosen in selections)
    rows = np.frombuffer(done.body, dtype=np.float32).reshape(-1, layout.head_dim)
    at = 0
    for keys, values, chosen in zip(prefilled.keys, prefilled.values, selections, strict=True):
        kept = positions(chosen)
        for tensor in (keys, values):
            for head in range(layout.num_kv_heads):
                wanted = tensor[head][kept[head]]
                np.testing.assert_array_equal(rows[at : at + len(wanted)], wanted)
                at += len(wanted)
    assert at == len(rows)


def test_what_was_kept_is_reported(compute: PrefillCompute, prompt: Prompt) -> None:
    done = run(compute, job(), prompt)
    made, report = done.manifest, done.events[1]
    assert made is not None
    assert isinstance(report, Compressed)
    assert report.message == public.Compression(
        policy="vl_cache",
        requested_retention=0.3,
        realised_retention=made.realised_retention,
        full_bytes=made.layout.full_bytes(prompt.shape.num_tokens),
        kept_bytes=made.body_bytes,
        layer_tokens=made.num_kept[:: made.layout.num_kv_heads],
        layer_attention_mass=made.layer_attention_mass,
        prompt_tokens=prompt.shape.num_tokens,
        visual_tokens=prompt.shape.num_visual,
    )


def test_retention_one_observes_nothing_and_ships_everything(
    compute: PrefillCompute, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefill_worker.compression.attention.kernels_for", lambda _: pytest.fail("observed"))
    done = run(compute, job(retention=1.0), prompt)
    made: Manifest | None = done.manifest
    assert made is not None
    assert set(made.num_kept) == {prompt.shape.num_tokens}
    assert (made.realised_retention, made.layer_attention_mass) == (1.0, (1.0, 1.0, 1.0))


def test_equal_requests_make_equal_parcels(compute: PrefillCompute, prompt: Prompt) -> None:
    first, second = (run(compute, job(), prompt) for _ in range(2))
    assert first.manifest == second.manifest
    assert first.body is not None
    assert first.manifest is not None
    assert first.manifest.digest == body_digest(first.body)


def encoded_run(compute: PrefillCompute, prompt: Prompt, retention: float, **wire: Any) -> Computed:
    work = dataclasses.replace(job(retention), wire=Wire(group=8, residual=0, **wire))
    return run(compute, work, prompt)


@pytest.mark.parametrize("retention", [0.5, 1.0])
@pytest.mark.parametrize("wire", [{"bits": 4}, {"key_channels": 0.5}, {"bits": 8, "key_channels": 0.5}])
def test_an_encoded_parcel_is_smaller_and_all_else_is_as_without(
    compute: PrefillCompute, prompt: Prompt, retention: float, wire: dict[str, Any]
) -> None:
    plain, done = run(compute, job(retention), prompt), encoded_run(compute, prompt, retention, **wire)
    assert done.events == plain.events  # what is kept is told, not what will be sent
    made, like = done.manifest, plain.manifest
    assert made is not None
    assert like is not None
    assert done.body is not None
    made.check()
    made.check_digest(done.body)
    assert made.encoding is not None
    assert made.body_bytes < like.body_bytes
    changed = {"encoding": None, "body_bytes": like.body_bytes, "digest": like.digest}
    assert dataclasses.replace(made, **changed) == like


def test_equal_encoded_requests_make_equal_parcels(compute: PrefillCompute, prompt: Prompt) -> None:
    first, second = (encoded_run(compute, prompt, 0.5, bits=2, key_channels=0.6) for _ in range(2))
    assert first.manifest == second.manifest


def several(*settings: tuple[Policy, float]) -> list[PrefillJob]:
    return [dataclasses.replace(job(retention), policy=policy) for policy, retention in settings]


def test_a_pass_for_several_jobs_gives_each_its_own_parcel(compute: PrefillCompute, prompt: Prompt) -> None:
    jobs = several((POLICY, 0.3), (SnapKV(window=4), 0.2), (POLICY, 1.0), (POLICY, 0.5))
    shared = compute.prefill(jobs, prompt, threading.Event())
    for work in jobs:
        alone, body = run(compute, work, prompt), memoryview(bytearray(room_for(compute, work, prompt)))
        events: list[Event] = []
        complete = compute.compress(work, prompt, shared, body, events.append)
        assert complete is not None
        assert (complete(), events) == (alone.manifest, alone.events)
        assert alone.manifest is not None
        assert body[: alone.manifest.body_bytes] == alone.body


def test_what_several_jobs_need_is_measured_once(
    compute: PrefillCompute, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps: list[range] = []
    plain = LayerAttention.sweep

    def sweep(layer: LayerAttention, rows: range, threshold: float) -> Any:
        sweeps.append(rows)
        return plain(layer, rows, threshold)

    monkeypatch.setattr(LayerAttention, "sweep", sweep)
    jobs = several((POLICY, 0.3), (POLICY, 0.5), (VLCache(shared_heads=False), 0.3))
    prefilled = compute.prefill(jobs, prompt, threading.Event())
    assert len(sweeps) == len(prefilled.keys)


@pytest.mark.parametrize(("message", "applied"), [(user(QUESTION * 3), "vl_cache"), (PICTURED, "air_cache")])
def test_it_says_which_policy_ran(
    compute: PrefillCompute, builder: PromptBuilder, message: public.Message, applied: str
) -> None:
    work = dataclasses.replace(job(), policy=AirCache())
    done = run(compute, work, builder.build([message], max_new_tokens=1))
    assert done.manifest is not None
    assert done.manifest.policy == applied
    (report,) = (event.message for event in done.events if isinstance(event, Compressed))
    assert report.policy == applied


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 11}, {"temperature": 1.5, "seed": 12}])
def test_the_first_token_stands_right_after_the_prompt(
    compute: PrefillCompute, engine: PrefillEngine, prompt: Prompt, sampling: dict[str, Any]
) -> None:
    work = job(**sampling)
    done = run(compute, work, prompt)
    expected = sample(logits_of(engine, prompt), work.sampling, prompt.shape.num_tokens)
    assert done.first.token == expected
    assert done.first.finish_reason == public.FINISH_REASON_UNSPECIFIED
    assert (done.first.prompt_tokens, done.first.visual_tokens) == (prompt.shape.num_tokens, 16)
    assert done.manifest is not None
    assert done.manifest.generated == (expected,)


def with_first_token(compute: PrefillCompute, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.model.sampler.sample", lambda *_: token)


EOS = tokenizer().eos_token_id
WORD = tokenizer()(" circle", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(
    ("token", "sampling", "reason", "text"),
    [
        (EOS, {"ignore_eos": False}, public.FINISH_REASON_STOP, ""),
        (WORD, {"stop": ("circ",)}, public.FINISH_REASON_STOP, " "),
        (WORD, {"max_new_tokens": 1}, public.FINISH_REASON_LENGTH, " circle"),
        (WORD, {"max_new_tokens": 1, "stop": ("le and",)}, public.FINISH_REASON_LENGTH, " circle"),
        (EOS, {"max_new_tokens": 1, "ignore_eos": False}, public.FINISH_REASON_STOP, ""),
    ],
)
def test_an_answer_may_end_with_its_first_token(
    compute: PrefillCompute,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    token: int,
    sampling: dict[str, Any],
    reason: int,
    text: str,
) -> None:
    with_first_token(compute, token, monkeypatch)
    done = run(compute, job(**sampling), prompt)
    assert done.manifest is None
    assert len(done.events) == 1
    assert (done.first.token, done.first.finish_reason, done.first.text) == (token, reason, text)


@pytest.mark.parametrize(
    ("token", "sampling", "text"), [(EOS, {}, ""), (WORD, {"stop": ("le and",)}, " circ"), (WORD, {}, " circle")]
)
def test_otherwise_it_goes_on(
    compute: PrefillCompute,
    prompt: Prompt,
    monkeypatch: pytest.MonkeyPatch,
    token: int,
    sampling: dict[str, Any],
    text: str,
) -> None:
    """What may become a stop string is held back; the decode worker will say it."""
    with_first_token(compute, token, monkeypatch)
    done = run(compute, job(**sampling), prompt)
    assert (done.first.finish_reason, done.first.text) == (public.FINISH_REASON_UNSPECIFIED, text)
    assert done.manifest is not None


def test_a_cancelled_job_says_nothing(compute: PrefillCompute, prompt: Prompt) -> None:
    work, events = job(), []
    work.cancelled.set()
    with pytest.raises(RequestCancelledError):
        compute.run(work, prompt, memoryview(bytearray(10)), events.append)
    assert events == []
