"""A second pass for an answer whose beginning is known, and a decode worker that has promised room for few tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.policies.look_ahead import LookAheadPolicy
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import Event, FirstToken, NextToken, PrefillJob
from prefill_worker.opening import DrawnToken, Opening
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.model.loading import load_spec
from shared.request.params import Budget, Guard
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.tiny import tokenizer
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

STEPS = 5
GREEDY = {"max_new_tokens": STEPS + 5, "ignore_eos": True}
SEEDED = {**GREEDY, "temperature": 1.5, "seed": 11}
# tokens of which the model would never have thought
FOREIGN = (3, 1, 4, 1)


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    return builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=1)


@pytest.fixture(scope="module")
def compute(engine: PrefillEngine, checkpoint: Path) -> PrefillCompute:
    spec = load_spec(checkpoint, torch.float32)
    identity = ModelIdentity.of("tiny", checkpoint, spec)
    return PrefillCompute(engine, tokenizer(), spec, identity, PrefillMetrics(worker="p", model="tiny"))


class Computed:
    """One run: its events, its tokens, and the parcel."""

    def __init__(self, compute: PrefillCompute, prompt: Prompt, work: PrefillJob) -> None:
        self.events: list[Event] = []
        body = memoryview(bytearray(1 << 20))
        complete = compute.run(work, prompt, body, self.events.append, lambda budget: body)
        self.manifest: Manifest | None = complete() if complete else None
        self.body = bytes(body[: self.manifest.body_bytes]) if self.manifest else b""
        self.tokens = tuple(event.token for event in self.events if isinstance(event, FirstToken | NextToken))


def job(policy: Policy, sampling: dict[str, Any], *, promised: int | None = None, **changes: Any) -> PrefillJob:
    plain = plain_job()
    return dataclasses.replace(
        plain,
        **{
            "sampling": Sampling(**sampling),
            "budget": Budget(retention=0.3),
            "policy": policy,
            "ticket": dataclasses.replace(plain.ticket, promised_tokens=promised),
            **changes,
        },
    )


JOBS: dict[str, dict[str, Any]] = {
    "plain": {"policy": VLCache(min_tokens=4)},
    "handed over": {"policy": LookAheadPolicy(tokens=STEPS)},
    "drafts": {"policy": LookAheadPolicy(tokens=STEPS, hand_off=False)},
    "too far ahead": {"policy": LookAheadPolicy(tokens=STEPS), "promised": 2},
    "guarded": {"policy": VLCache(min_tokens=4), "guard": Guard(max_dropped_attention=0.05)},
}


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", JOBS)
def test_the_parcel_is_that_of_the_lost_attempt(
    compute: PrefillCompute, prompt: Prompt, kind: str, sampling: dict[str, Any]
) -> None:
    first = Computed(compute, prompt, job(sampling=sampling, **JOBS[kind]))
    assert first.manifest is not None
    cuts = {first.tokens[:known] for known in range(len(first.tokens) + 1)}
    for delivered in (*cuts, (*first.tokens, *FOREIGN)):
        again = Computed(compute, prompt, job(sampling=sampling, delivered=(delivered,), **JOBS[kind]))
        assert (again.manifest, again.body) == (first.manifest, first.body)
        assert again.events == first.events


def test_delivered_tokens_are_believed(compute: PrefillCompute, prompt: Prompt) -> None:
    """Whoever delivered them may have computed on other hardware: what the client has seen stays the answer."""
    known = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), GREEDY, delivered=(FOREIGN,)))
    assert known.tokens[: len(FOREIGN)] == FOREIGN
    assert len(known.tokens) == 1 + STEPS
    assert known.manifest is not None
    assert known.manifest.generated == known.tokens


def drawn(opening: Opening, logits: torch.Tensor) -> list[DrawnToken]:
    tokens = []
    for row in logits:
        tokens.append(opening.draw(row))
        if opening.ended:
            break
    return tokens


def opening(sampling: Sampling, delivered: tuple[int, ...] = ()) -> Opening:
    return Opening(tokenizer(), sampling, frozenset({tokenizer().eos_token_id}), 40, delivered=delivered)


@pytest.mark.parametrize("seed", range(6))
def test_text_and_end_are_those_of_drawn_tokens(seed: int) -> None:
    """Cuts go through open characters and stop strings, too; one answer ends by itself."""
    logits = torch.randn(24, len(tokenizer()), generator=torch.Generator().manual_seed(seed))
    if seed == 0:
        logits[9, tokenizer().eos_token_id] = 1e4
    sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=seed, stop=("zzz", "e the"))
    expected = drawn(opening(sampling), logits)
    tokens = tuple(each.token for each in expected)
    for known in range(len(tokens) + 1):
        assert drawn(opening(sampling, tokens[:known]), logits) == expected
    assert expected[-1].finish_reason
    assert not any(each.finish_reason for each in expected[:-1])


PROMISES = [(None, 1 + STEPS), (STEPS + 2, 1 + STEPS), (STEPS + 1, 1 + STEPS), (STEPS, 1), (1, 1)]


@pytest.mark.parametrize(("promised", "tokens"), PROMISES)
def test_a_parcel_brings_no_more_tokens_than_were_promised(
    compute: PrefillCompute, prompt: Prompt, promised: int | None, tokens: int
) -> None:
    done = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), GREEDY, promised=promised))
    assert len(done.tokens) == tokens
    assert done.manifest is not None
    assert len(done.manifest.generated) == tokens
    if tokens == 1:
        drafted = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS, hand_off=False), GREEDY))
        assert (done.manifest, done.body) == (drafted.manifest, drafted.body)


@pytest.mark.parametrize("promised", [1, STEPS])
def test_a_second_attempt_drafts_what_the_first_one_did(compute: PrefillCompute, prompt: Prompt, promised: int) -> None:
    """The room that decode workers promise grows with what was delivered."""
    policy, sampling = LookAheadPolicy(tokens=STEPS), {**GREEDY, "max_new_tokens": 40}
    first = Computed(compute, prompt, job(policy, sampling, promised=promised))
    delivered = (*first.tokens, *FOREIGN, *FOREIGN)
    work = job(policy, sampling, promised=promised, delivered=(delivered,))
    again = Computed(compute, prompt, work)
    assert (again.manifest, again.body) == (first.manifest, first.body)
    assert again.events == first.events


@pytest.mark.parametrize("promised", [1, 2])
def test_an_answer_that_ends_here_needs_no_promise(compute: PrefillCompute, prompt: Prompt, promised: int) -> None:
    sampling = {**GREEDY, "max_new_tokens": 3}
    done = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), sampling, promised=promised))
    assert done.manifest is None
    assert len(done.tokens) == 3
    last = done.events[-1]
    assert isinstance(last, NextToken)
    assert last.finish_reason == public.FINISH_REASON_LENGTH
