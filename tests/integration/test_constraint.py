"""Answers of a given form, through the service: over every way of a parcel, as one process draws them."""

from __future__ import annotations

import asyncio
import json
import re

import jsonschema
import pytest
import vlcache

from models.shapes_vlm.paths import CHECKPOINT
from models.shapes_vlm.questions import Sample, draw_samples
from shared.model.grammar import Grammar, Tokens
from shared.model.loading import load_tokenizer
from shared.model.sampler import Sampler
from shared.request.constraint import Constraint
from shared.request.sampling import Sampling
from tests.integration.reference import Reference
from tests.integration.running_stack import RunningStack

PROMPT = "What is the code on the red plate?"
VOCABULARY, EOS = 540, 2
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", "green"]},
        "codes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["colour", "codes"],
    "additionalProperties": False,
}
EVERYTHING = vlcache.Compression(retention=1.0)


def hot(**more: object) -> vlcache.Sampling:
    return vlcache.Sampling(**{"max_new_tokens": 80, "temperature": 1.5, "seed": 7, **more})


def one_process(reference: Reference, sample: Sample, sampling: Sampling) -> list[int]:
    """The loop: the model's logits, a mask, a draw, until the grammar ends it."""
    tokens = Tokens.of(load_tokenizer(CHECKPOINT), vocabulary=VOCABULARY, eos_token_ids=[EOS]).load()
    assert sampling.constraint is not None
    sampler = Sampler(sampling, {EOS}, grammar=Grammar.compile(sampling.constraint, tokens))
    position = reference.inputs(sample.question, sample.images)["input_ids"].shape[1]
    answer: list[int] = []
    while len(answer) < sampling.max_new_tokens and not sampler.ended:
        logits = reference.logits(sample.question, sample.images, answer)[-1]
        answer.append(sampler.draw(logits, position + len(answer)).token)
        sampler.push(answer[-1])
    return answer


def test_json_is_what_the_schema_allows(stack: RunningStack) -> None:
    with stack.client() as client:
        for temperature in (0.0, 1.5):
            answer = client.generate(PROMPT, sampling=hot(json_schema=SCHEMA, temperature=temperature))
            assert answer.finish_reason is vlcache.FinishReason.STOP
            jsonschema.validate(json.loads(answer.text), SCHEMA)
    stack.wait_idle()


def test_every_other_form_is_kept(stack: RunningStack) -> None:
    forms = {
        r"(red|blue) [0-9]{3}": {"regex": r"(red|blue) [0-9]{3}"},
        r"\(a\)|\$b\.|c c": {"choices": ["(a)", "$b.", "c c"]},
        r"(ab)*c": {"grammar": 'start: "ab" start | "c"'},
    }
    with stack.client() as client:
        for pattern, form in forms.items():
            answer = client.generate(PROMPT, sampling=hot(**form))
            assert re.fullmatch(pattern, answer.text), (pattern, answer.text)
            assert answer.finish_reason is vlcache.FinishReason.STOP


@pytest.fixture(scope="module")
def sample() -> Sample:
    (drawn,) = draw_samples(seed=990_017, count=1)
    return drawn


@pytest.fixture(scope="module")
def expected(reference: Reference, sample: Sample) -> list[int]:
    """What one process draws."""
    return one_process(
        reference,
        sample,
        Sampling(
            max_new_tokens=40,
            temperature=1.5,
            seed=11,
            frequency_penalty=0.5,
            constraint=Constraint("json_schema", json.dumps(SCHEMA)),
        ),
    )


def test_a_constrained_stream_is_that_of_one_process(
    stack: RunningStack, reference: Reference, sample: Sample, expected: list[int]
) -> None:
    wanted = hot(max_new_tokens=40, seed=11, frequency_penalty=0.5, json_schema=SCHEMA, logprobs=1)
    with stack.client() as client:
        answer = client.generate(sample.question, images=sample.images, sampling=wanted, compression=EVERYTHING)
    assert list(answer.token_ids) == expected
    own = reference.logits(sample.question, sample.images, answer.token_ids).log_softmax(dim=-1)
    for place, each in enumerate(answer.logprobs):
        assert each.token.logprob == pytest.approx(float(own[place, each.token.token_id]), abs=2e-4)
        assert each.top[0].token_id == int(own[place].argmax()), "logprobs are not the model's own"


def test_tokens_that_are_decoded_ahead_are_masked_as_well(memory_stack: RunningStack, sample: Sample) -> None:
    ahead = vlcache.Compression(policy="look_ahead", retention=0.3)
    with memory_stack.client() as client:
        for choices in (["x"], ["red plates and nothing else at all", "blue"]):
            answer = client.generate(
                sample.question, images=sample.images, sampling=hot(choices=choices), compression=ahead
            )
            assert answer.text in choices
            assert answer.finish_reason is vlcache.FinishReason.STOP


def test_the_grammar_has_the_last_word_on_the_end(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client:
        forced = client.generate(PROMPT, sampling=hot(choices=["red"], ignore_eos=True, min_new_tokens=30))
        assert (forced.text, forced.finish_reason) == ("red", vlcache.FinishReason.STOP)
        longer = client.generate(PROMPT, sampling=hot(regex="[0-9]+", min_new_tokens=30, temperature=0))
        assert re.fullmatch("[0-9]{30,}", longer.text)
        endless = client.generate(PROMPT, sampling=hot(regex="[0-9]*", ignore_eos=True, max_new_tokens=20))
        assert re.fullmatch("[0-9]{20,}", endless.text)
        assert endless.finish_reason is vlcache.FinishReason.LENGTH
        stopped = client.generate(PROMPT, sampling=hot(regex="aaaab{1,100}", stop=("ab",)))
        assert (stopped.text, stopped.finish_reason) == ("aaa", vlcache.FinishReason.STOP)


def test_others_in_the_batch_say_what_they_say_alone(memory_stack: RunningStack) -> None:
    free = vlcache.Sampling(max_new_tokens=24, temperature=1.5, seed=5, ignore_eos=True)

    async def together() -> list[vlcache.Completion]:
        async with memory_stack.async_client() as client:
            wanted = (free, hot(json_schema=SCHEMA), free, hot(regex="[a-z]{60}"))
            return await asyncio.gather(*(client.generate(PROMPT, sampling=each) for each in wanted))

    with memory_stack.client() as client:
        alone = client.generate(PROMPT, sampling=free)
    answers = asyncio.run(together())
    assert answers[0].token_ids == answers[2].token_ids == alone.token_ids
    jsonschema.validate(json.loads(answers[1].text), SCHEMA)
    assert re.fullmatch("[a-z]{60}", answers[3].text)


BAD = [
    ({"json_schema": '{"type": "strng"}'}, "Invalid type: strng"),
    ({"json_schema": '{"not": {}}'}, "Unimplemented keys"),
    ({"json_schema": '{"$ref": "http://example.com/x.json"}'}, "example.com"),
    ({"json_schema": '{"$ref": "#/nowhere"}'}, "nowhere"),
    ({"json_schema": '{"minLength": 3, "maxLength": 2, "type": "string"}'}, "Unsatisfiable"),
    ({"regex": "(red"}, "unclosed group"),
    ({"regex": "(?=a)"}, "look-around"),
    ({"regex": "a" * 17_000}, "1 to 16384 bytes"),
    ({"grammar": "start: nobody"}, "nobody"),
    ({"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'}, "too complex"),
]


def test_what_cannot_be_followed_is_refused_before_anything_is_said(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client:
        for form, why in BAD:
            refusal = pytest.raises(vlcache.InvalidRequest, match=why)
            with client.stream(PROMPT, sampling=hot(**form)) as stream, refusal as refused:
                list(stream)
            assert refused.value.reason == "CONSTRAINT"
        assert client.generate(PROMPT, sampling=hot(choices=["red"])).text == "red", "nobody is left to try grammars"
    memory_stack.wait_idle()
