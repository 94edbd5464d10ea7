"""Tokens decoded over the full KV: what `generate` says, what they attend to, and a decode worker that goes on."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.policies.look_ahead import LookAheadPolicy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.job import Compressed, Event, FirstToken, NextToken, PrefillJob
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import InvalidRequestError, RequestCancelledError
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.request.params import Budget
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import HEAD_DIM, KV_HEADS, LAYERS, tokenizer
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

STEPS = 5


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    return builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=1)


@pytest.fixture(scope="module")
def prefilled(engine: PrefillEngine, prompt: Prompt) -> Prefilled:
    return engine.prefill(prompt, (), threading.Event())


@pytest.fixture(scope="module")
def generated(whole: Any, prompt: Prompt) -> list[int]:
    """The greedy answer of transformers."""
    with torch.inference_mode():
        ids = whole.generate(**prompt.inputs, max_new_tokens=STEPS + 5, min_new_tokens=STEPS + 5, do_sample=False)
    return ids[0, prompt.shape.num_tokens :].tolist()


@pytest.fixture
def compute(engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> PrefillCompute:
    identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
    metrics = PrefillMetrics(worker="p", model="tiny")
    return PrefillCompute(engine, tokenizer(), builder._spec, identity, metrics)


def looked(engine: PrefillEngine, prefilled: Prefilled, prompt: Prompt, steps: int) -> tuple[Prefilled, list[int]]:
    tokens = [int(prefilled.logits.argmax())]

    def draw(logits: torch.Tensor) -> int:
        tokens.append(int(logits.argmax()))
        return tokens[-1]

    return engine.look_ahead(prefilled, tokens[0], prompt.next_position, steps, draw), tokens


def test_tokens_are_those_of_generate(
    engine: PrefillEngine, prefilled: Prefilled, prompt: Prompt, generated: list[int]
) -> None:
    _, tokens = looked(engine, prefilled, prompt, STEPS)
    assert tokens == generated[: STEPS + 1]


def test_kv_and_attention_are_those_of_one_pass_over_prompt_and_answer(
    engine: PrefillEngine, prefilled: Prefilled, prompt: Prompt, whole: Any
) -> None:
    ahead, tokens = looked(engine, prefilled, prompt, STEPS)
    num_tokens = prompt.shape.num_tokens
    longer = torch.cat([prompt.inputs["input_ids"], torch.tensor([tokens[:STEPS]])], dim=1)
    with torch.inference_mode():
        output = whole(**{**prompt.inputs, "input_ids": longer}, use_cache=True, output_attentions=True)
    for layer in range(LAYERS):
        rows = output.past_key_values.layers[layer]
        torch.testing.assert_close(ahead.keys[layer], rows.keys[0], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(ahead.values[layer], rows.values[0], rtol=2e-4, atol=2e-4)
        received = output.attentions[layer][0, :, num_tokens:, :num_tokens].sum(dim=1).view(KV_HEADS, -1, num_tokens)
        torch.testing.assert_close(ahead.ahead[layer], received.sum(dim=1), rtol=2e-4, atol=2e-4)


def test_the_pass_itself_stays_as_it_was(engine: PrefillEngine, prefilled: Prefilled, prompt: Prompt) -> None:
    before = [key.clone() for key in prefilled.keys]
    looked(engine, prefilled, prompt, STEPS)
    assert all(torch.equal(key, copy) for key, copy in zip(prefilled.keys, before, strict=True))


def test_it_stops_when_nothing_is_drawn(engine: PrefillEngine, prefilled: Prefilled, prompt: Prompt) -> None:
    ahead = engine.look_ahead(prefilled, 3, prompt.next_position, STEPS, lambda _: None)
    assert ahead.keys[0].shape == (KV_HEADS, prompt.shape.num_tokens + 1, HEAD_DIM)


class Computed:
    """One run: its events, manifest and body."""

    def __init__(self, compute: PrefillCompute, prompt: Prompt, work: PrefillJob) -> None:
        self.events: list[Event] = []
        bound = work.budget.kept_tokens_bound(0, prompt.shape.num_tokens) + work.sampling.max_new_tokens - 1
        body = memoryview(bytearray(compute._identity.layout.full_bytes(bound)))
        complete = compute.run(work, prompt, body, self.events.append)
        self.manifest = complete() if complete else None
        self.body = body[: self.manifest.body_bytes] if self.manifest else None
        self.tokens = [event.token for event in self.events if isinstance(event, FirstToken | NextToken)]

    @property
    def parcel(self) -> Manifest:
        assert self.manifest is not None
        return self.manifest


def job(policy: LookAheadPolicy, retention: float = 0.3, **sampling: Any) -> PrefillJob:
    values = {"max_new_tokens": STEPS + 5, "ignore_eos": True, **sampling}
    return dataclasses.replace(
        plain_job(), sampling=Sampling(**values), budget=Budget(retention=retention), policy=policy
    )


def test_the_parcel_goes_on_after_what_was_decoded(
    compute: PrefillCompute, prompt: Prompt, generated: list[int]
) -> None:
    done = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS)))
    assert done.tokens == generated[: STEPS + 1]
    assert isinstance(done.events[-1], Compressed)
    made, num_tokens = done.parcel, prompt.shape.num_tokens
    made.check()
    assert made.generated == tuple(done.tokens)
    assert made.next_position == made.logical_length == num_tokens + STEPS
    assert set(made.num_kept) == {max(16, int(0.3 * num_tokens)) + STEPS}
    assert made.tokens_to_come == 4


def test_the_rows_of_the_answer_close_every_head(
    compute: PrefillCompute, engine: PrefillEngine, prefilled: Prefilled, prompt: Prompt
) -> None:
    done = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS)))
    ahead, _ = looked(engine, prefilled, prompt, STEPS)
    assert done.body is not None
    rows = torch.frombuffer(done.body, dtype=torch.float32).view(-1, HEAD_DIM)
    kept = done.parcel.num_kept[0]
    for layer, (keys, values) in enumerate(zip(ahead.keys, ahead.values, strict=True)):
        for part, tensor in enumerate((keys, values)):
            for head in range(KV_HEADS):
                end = ((2 * layer + part) * KV_HEADS + head + 1) * kept
                torch.testing.assert_close(rows[end - STEPS : end], tensor[head, -STEPS:], rtol=1e-5, atol=1e-5)


def test_drafts_only_select(compute: PrefillCompute, prompt: Prompt) -> None:
    kept = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS)))
    drafted = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS, hand_off=False)))
    assert len(drafted.tokens) == 1
    made = drafted.parcel
    assert (made.generated, made.next_position) == ((drafted.tokens[0],), prompt.shape.num_tokens)
    assert [count + STEPS for count in made.num_kept] == list(kept.parcel.num_kept)


def test_seeded_tokens_are_those_that_the_decode_worker_would_draw(compute: PrefillCompute, prompt: Prompt) -> None:
    sampling = {"temperature": 1.5, "seed": 11}
    few, many = (Computed(compute, prompt, job(LookAheadPolicy(tokens=n), **sampling)) for n in (1, STEPS))
    assert few.tokens == many.tokens[:2]
    other = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), temperature=1.5, seed=12))
    assert other.tokens != many.tokens


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason"),
    [({"max_new_tokens": 3}, 3, public.FINISH_REASON_LENGTH), ({"max_new_tokens": 1}, 1, public.FINISH_REASON_LENGTH)],
)
def test_a_short_answer_never_crosses(
    compute: PrefillCompute, prompt: Prompt, sampling: dict[str, Any], tokens: int, reason: int
) -> None:
    done = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), **sampling))
    assert done.manifest is None
    assert len(done.events) == tokens
    last = done.events[-1]
    assert isinstance(last, FirstToken | NextToken)
    assert last.finish_reason == reason


def test_a_stop_string_across_these_tokens_ends_the_answer(
    compute: PrefillCompute, prompt: Prompt, generated: list[int]
) -> None:
    text = tokenizer().decode(generated[:4], skip_special_tokens=True)
    done = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), stop=(text,)))
    assert done.manifest is None
    assert "".join(event.text for event in done.events if isinstance(event, FirstToken | NextToken)) == ""


def test_retention_one_looks_nowhere(compute: PrefillCompute, prompt: Prompt) -> None:
    done = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), retention=1.0))
    assert len(done.tokens) == 1
    assert set(done.parcel.num_kept) == {prompt.shape.num_tokens}


def test_a_cancelled_job_stops_between_tokens(
    compute: PrefillCompute, engine: PrefillEngine, prefilled: Prefilled, prompt: Prompt
) -> None:
    work, events = job(LookAheadPolicy(tokens=STEPS)), list[Event]()

    def emit(event: Event) -> None:
        events.append(event)
        if len(events) == 2:
            work.cancelled.set()

    with pytest.raises(RequestCancelledError):
        compute.run(work, prompt, memoryview(bytearray(1 << 20)), emit)
    assert len(events) == 2


@pytest.mark.parametrize("parameters", [{"tokens": 0}, {"tokens": 65}, {"recent_share": 1.5}])
def test_bad_parameters_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        LookAheadPolicy(**parameters)
