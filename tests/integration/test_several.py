"""Several answers of one prompt: each is, token for token, the answer that its seed draws alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import vlcache

from models.shapes_vlm.questions import Sample, draw_samples
from shared.request.sampling import SEED_STEP
from tests.integration.running_stack import RunningStack

Ask = Callable[[vlcache.Sampling], vlcache.Completion]
HOT = vlcache.Sampling(max_new_tokens=20, temperature=1.5, seed=2**64 - 5, ignore_eos=True)
GREEDY = vlcache.Sampling(max_new_tokens=12, ignore_eos=True)
# each of its answers may end at another token, the first one included
SHORT = replace(HOT, temperature=6.0, ignore_eos=False, stop=("o", "r"), max_new_tokens=9)
CHANGED = replace(
    HOT,
    temperature=6.0,
    presence_penalty=1.5,
    repetition_penalty=1.3,
    logit_bias={40: 3.0},
    min_new_tokens=4,
    logprobs=2,
    stop=("o",),
)
FORMED = replace(HOT, temperature=3.0, ignore_eos=False, regex="[a-z]{2,5}( [a-z]{1,9}){0,4}")
SAMPLINGS = {"sampled": HOT, "greedy": GREEDY, "endings": SHORT, "changed logits": CHANGED, "of a form": FORMED}


LOOKING = vlcache.Compression(policy="look_ahead", parameters={"tokens": 5}, retention=0.1)


@pytest.fixture(scope="module")
def sample() -> Sample:
    return next(iter(draw_samples(seed=990_002, count=1)))


def parts(completion: vlcache.Completion) -> list[Any]:
    return [(each.text, each.token_ids, each.finish_reason) for each in completion.choices]


def alone(ask: Ask, sampling: vlcache.Sampling, n: int) -> list[Any]:
    """What each of the answers must be, one request each."""
    first = sampling.seed or 0
    seeds = [(first + choice * SEED_STEP) % 2**64 for choice in range(n)]
    return [part for seed in seeds for part in parts(ask(replace(sampling, seed=seed)))]


@contextmanager
def asking(stack: RunningStack, sample: Sample, **more: Any) -> Iterator[Ask]:
    with stack.client() as client:
        yield lambda sampling: client.generate(sample.question, images=sample.images, sampling=sampling, **more)
    stack.wait_idle()


@pytest.mark.parametrize("how", SAMPLINGS)
def test_each_answer_is_the_one_that_its_seed_draws_alone(stack: RunningStack, sample: Sample, how: str) -> None:
    with asking(stack, sample) as ask:
        expected = alone(ask, SAMPLINGS[how], 4)
        several = ask(replace(SAMPLINGS[how], n=4))
    assert parts(several) == expected
    assert parts(several)[0] == (several.text, several.token_ids, several.finish_reason)
    assert several.usage.generated_tokens == sum(len(tokens) for _, tokens, *_ in expected)
    for choice in several.choices:
        reported = [each.token.token_id for each in choice.logprobs]
        assert reported == ([] if SAMPLINGS[how].logprobs is None else list(choice.token_ids))
    if how != "greedy":
        assert len({tokens for _, tokens, *_ in expected}) > 2, "answers that differ"


@pytest.mark.parametrize(
    ("policy", "parameters"), [("h2o", {}), ("scope", {"decode_window": 8, "decode_recent": 4}), ("tidal_decode", {})]
)
def test_rows_that_one_answer_drops_are_no_other_s(
    memory_stack: RunningStack, sample: Sample, policy: str, parameters: dict[str, Any]
) -> None:
    compression = vlcache.Compression(policy=policy, retention=0.3, parameters=parameters)
    with asking(memory_stack, sample, compression=compression) as ask:
        assert parts(ask(replace(HOT, n=3))) == alone(ask, HOT, 3)


def test_what_is_decoded_ahead_belongs_to_the_first_answer(stack: RunningStack, sample: Sample) -> None:
    """The others begin behind the prompt, of which the same is kept."""
    with asking(stack, sample, compression=LOOKING) as ask:
        (first,) = alone(ask, HOT, 1)
        several = ask(replace(HOT, n=4))
        more = ask(replace(HOT, n=2))
        # nothing of the others' tokens is told by what is kept for them: the first choice alone decides
        seventh = ask(replace(HOT, n=1))
    assert parts(several)[0] == first == parts(seventh)[0]
    assert parts(several)[:2] == parts(more)
    assert [len(tokens) for _, tokens, *_ in parts(several)] == [HOT.max_new_tokens] * 4
    assert len({tokens for _, tokens, *_ in parts(several)}) == 4


def test_answers_that_all_end_with_their_first_token_never_cross(stack: RunningStack, sample: Sample) -> None:
    with asking(stack, sample) as ask:
        answer = ask(replace(HOT, n=5, max_new_tokens=1))
    assert [len(tokens) for _, tokens, *_ in parts(answer)] == [1] * 5
    assert (answer.compression, answer.transfer) == (None, None)


def test_the_prompt_is_sent_and_computed_once(memory_stack: RunningStack, sample: Sample) -> None:
    with asking(memory_stack, sample) as ask:
        one, several = ask(HOT), ask(replace(HOT, n=8))
    assert one.transfer is not None
    assert several.transfer is not None
    # the manifest names the other answers
    assert one.transfer.sent_bytes <= several.transfer.sent_bytes < one.transfer.sent_bytes + 200
    assert several.compression == one.compression


def test_the_stream_says_whose_each_piece_is(memory_stack: RunningStack, sample: Sample) -> None:
    with memory_stack.client() as client:
        sampling = replace(HOT, n=3)
        with client.stream(sample.question, images=sample.images, sampling=sampling) as stream:
            deltas = [event for event in stream if isinstance(event, vlcache.Delta)]
            result = stream.result()
    for number, choice in enumerate(result.choices):
        mine = [delta for delta in deltas if delta.choice == number]
        assert "".join(delta.text for delta in mine) == choice.text
        assert [delta.finish_reason for delta in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason is choice.finish_reason
    memory_stack.wait_idle()


def test_more_answers_than_sixteen_are_refused(memory_stack: RunningStack) -> None:
    class Unchecked(vlcache.Sampling):
        def __post_init__(self) -> None:
            """Nothing is checked here."""

    with memory_stack.client() as client, pytest.raises(vlcache.InvalidRequest, match=r"n must lie in \[1, 16\]"):
        client.generate("?", sampling=Unchecked(n=17))
