"""First tokens of several answers, what is decoded ahead for one of them, and what the parcel says of them all."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from prefill_worker.compression.policies.look_ahead import LookAheadPolicy
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compute import PrefillCompute
from prefill_worker.job import Compressed, FirstToken, NextToken
from prefill_worker.prompt import Prompt
from shared.kv.manifest import Manifest
from shared.request.params import Guard
from shared.request.sampling import SEED_STEP
from tests.unit.prefill_worker.test_delivered import STEPS, Computed, compute, job, prompt

__all__ = ["compute", "prompt"]

HOT: dict[str, Any] = {"max_new_tokens": STEPS + 5, "ignore_eos": True, "temperature": 3.0, "seed": 11}


def events(computed: Computed, kind: type) -> list[Any]:
    return [event for event in computed.events if isinstance(event, kind)]


def firsts(compute: PrefillCompute, prompt: Prompt, sampling: dict[str, Any], n: int) -> list[int]:
    """What each answer begins with where it is drawn alone."""
    seeds = [(sampling["seed"] + choice * SEED_STEP) % 2**64 for choice in range(n)]
    runs = [Computed(compute, prompt, job(VLCache(min_tokens=4), sampling | {"seed": seed})) for seed in seeds]
    return [run.tokens[0] for run in runs]


@pytest.mark.parametrize("changes", [{}, {"logprobs": 2, "repetition_penalty": 1.4, "min_new_tokens": 3}])
def test_each_begins_as_it_does_alone(compute: PrefillCompute, prompt: Prompt, changes: dict[str, Any]) -> None:
    sampling = HOT | changes
    several = Computed(compute, prompt, job(VLCache(min_tokens=4), sampling | {"n": 5}))
    begun = events(several, FirstToken)
    assert [event.choice for event in begun] == list(range(5))
    assert [event.token for event in begun] == firsts(compute, prompt, sampling, 5)
    assert len({event.token for event in begun}) > 1
    assert all((event.logprobs is not None) == ("logprobs" in changes) for event in begun)
    manifest = several.manifest
    assert manifest is not None
    assert (manifest.choices, manifest.generated) == ((0, 1, 2, 3, 4), (begun[0].token,))
    assert [other.first_token for other in manifest.others] == [event.token for event in begun[1:]]
    read = Manifest.from_proto(manifest.to_proto())
    assert (read.choice, read.others, read.sampling.n) == (manifest.choice, manifest.others, 5)
    alone = Computed(compute, prompt, job(VLCache(min_tokens=4), sampling))
    assert several.body == alone.body, "the same is kept"
    assert alone.manifest is not None
    assert dataclasses.replace(manifest, others=(), sampling=alone.manifest.sampling) == alone.manifest


def test_one_that_ends_with_its_first_token_is_not_sent_on(compute: PrefillCompute, prompt: Prompt) -> None:
    begun = firsts(compute, prompt, HOT, 4)
    # whatever the first one begins with is none of the second's
    stops = next(token for token in begun if begun.count(token) == 1)
    gone = begun.index(stops)
    text = compute._tokenizer.decode([stops])
    several = Computed(compute, prompt, job(VLCache(min_tokens=4), HOT | {"n": 4, "stop": (text,)}))
    assert [bool(event.finish_reason) for event in events(several, FirstToken)][gone]
    assert several.manifest is not None
    assert gone not in several.manifest.choices


def test_the_first_that_goes_on_is_looked_ahead_for(compute: PrefillCompute, prompt: Prompt) -> None:
    begun = firsts(compute, prompt, HOT, 4)
    text = compute._tokenizer.decode([begun[0]])
    several = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), HOT | {"n": 4, "stop": (text,)}))
    ended = [bool(event.finish_reason) for event in events(several, FirstToken)]
    assert ended[0]
    leader = ended.index(False)
    manifest = several.manifest
    assert manifest is not None
    assert {event.choice for event in events(several, NextToken)} == {leader} == {manifest.choice}
    assert manifest.generated == (begun[leader], *(event.token for event in events(several, NextToken)))
    assert manifest.fed == STEPS


def test_where_it_ends_ahead_its_rows_are_not_sent(compute: PrefillCompute, prompt: Prompt) -> None:
    """What it has attended to still says what is kept."""
    policy = LookAheadPolicy(tokens=STEPS)
    going = Computed(compute, prompt, job(policy, HOT | {"n": 3}))
    assert going.manifest is not None
    others = [other.first_token for other in going.manifest.others]
    # no first token alone is as much
    stop = compute._tokenizer.decode(going.manifest.generated[1:3])
    ended = Computed(compute, prompt, job(policy, HOT | {"n": 3, "stop": (stop,)}))
    assert ended.manifest is not None
    assert [event.choice for event in events(ended, NextToken)] == [0, 0]
    assert (ended.manifest.choices, ended.manifest.fed) == ((1, 2), 0)
    assert [ended.manifest.generated[0], ended.manifest.others[0].first_token] == others
    assert ended.manifest.logical_length == prompt.shape.num_tokens
    assert sum(ended.manifest.num_kept) < sum(going.manifest.num_kept)
    assert len(events(ended, Compressed)) == 1


def test_nothing_is_sent_where_all_end(compute: PrefillCompute, prompt: Prompt) -> None:
    for policy in (VLCache(min_tokens=4), LookAheadPolicy(tokens=STEPS)):
        several = Computed(compute, prompt, job(policy, HOT | {"n": 16, "max_new_tokens": 1}))
        assert several.manifest is None
        assert len(several.events) == 16


@pytest.mark.parametrize("kind", ["plain", "handed over", "drafts", "too far ahead", "guarded"])
def test_a_second_pass_makes_the_same_parcel(compute: PrefillCompute, prompt: Prompt, kind: str) -> None:
    """Whatever was delivered of which answer, complete ones included."""
    how: dict[str, dict[str, Any]] = {
        "plain": {"policy": VLCache(min_tokens=4)},
        "handed over": {"policy": LookAheadPolicy(tokens=STEPS)},
        "drafts": {"policy": LookAheadPolicy(tokens=STEPS, hand_off=False)},
        "too far ahead": {"policy": LookAheadPolicy(tokens=STEPS), "promised": 2},
        "guarded": {"policy": VLCache(min_tokens=4), "guard": Guard(max_dropped_attention=0.05)},
    }
    sampling = HOT | {"n": 3}
    first = Computed(compute, prompt, job(sampling=sampling, **how[kind]))
    assert first.manifest is not None
    begun = [event.token for event in events(first, FirstToken)]
    leads = first.manifest.generated
    complete = (*leads, *[3] * (HOT["max_new_tokens"] - len(leads)))
    for delivered in (
        (leads[:1], (), ()),
        ((), (begun[1], 9, 9), (begun[2],)),
        (complete, (begun[1],)),
        (leads, (begun[1], 7), (begun[2], *[4] * (HOT["max_new_tokens"] - 1))),
    ):
        again = Computed(compute, prompt, job(sampling=sampling, delivered=delivered, **how[kind]))
        assert (again.manifest, again.body) == (first.manifest, first.body)
        assert again.events == first.events


def test_alone_an_answer_has_all_but_another_s_rows(compute: PrefillCompute, prompt: Prompt) -> None:
    several = Computed(compute, prompt, job(LookAheadPolicy(tokens=STEPS), HOT | {"n": 3}))
    manifest = several.manifest
    assert manifest is not None
    leading, other = manifest.alone(0), manifest.alone(2)
    assert dataclasses.replace(manifest, others=(), sampling=leading.sampling) == leading
    assert leading.sampling.n == other.sampling.n == 1
    assert other.sampling.seed == (11 + 2 * SEED_STEP) % 2**64
    assert (np.array(manifest.num_kept) - other.num_kept == STEPS).all()
    assert (other.logical_length, other.next_position) == (prompt.shape.num_tokens, prompt.next_position)
    assert (other.generated, other.choice, other.choices) == ((manifest.others[1].first_token,), 2, (2,))
