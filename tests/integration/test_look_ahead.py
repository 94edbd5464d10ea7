"""The prefill worker decodes the answer's first tokens itself, through real processes and every way of a parcel."""

from __future__ import annotations

from typing import Any

import pytest
import vlcache

from models.shapes_vlm.questions import Sample, draw_samples
from tests.integration.running_stack import RunningStack

AHEAD = 8
LOOKING = vlcache.Compression(policy="look_ahead", parameters={"tokens": AHEAD}, retention=0.1)
EVERYTHING = vlcache.Compression(retention=1.0)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(draw_samples(seed=990_002, count=3))


def endless(max_new_tokens: int, **more: Any) -> vlcache.Sampling:
    return vlcache.Sampling(max_new_tokens=max_new_tokens, ignore_eos=True, **more)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "seed": 5}])
def test_the_first_tokens_are_those_of_the_full_cache(
    stack: RunningStack, samples: list[Sample], how: dict[str, Any]
) -> None:
    with stack.client() as client:
        for sample in samples:
            asked = {"images": sample.images, "sampling": endless(30, **how)}
            full = client.generate(sample.question, compression=EVERYTHING, **asked)
            answer = client.generate(sample.question, compression=LOOKING, **asked)
            assert answer.token_ids[: AHEAD + 1] == full.token_ids[: AHEAD + 1]
            assert len(answer.token_ids) == answer.usage.generated_tokens == 30
            assert answer.compression is not None
            assert answer.compression.realised_retention < 0.13
    stack.wait_idle()


def test_a_short_answer_never_crosses(stack: RunningStack, samples: list[Sample]) -> None:
    with stack.client() as client:
        answer = client.generate(
            samples[0].question, images=samples[0].images, sampling=endless(AHEAD), compression=LOOKING
        )
    assert len(answer.token_ids) == AHEAD
    assert (answer.compression, answer.transfer) == (None, None)
    stack.wait_idle()


def test_a_stop_string_may_begin_before_the_hand_over_and_end_after_it(
    stack: RunningStack, samples: list[Sample]
) -> None:
    sample = samples[0]
    with stack.client() as client:
        asked = {"images": sample.images, "compression": LOOKING}
        with client.stream(sample.question, sampling=endless(40), **asked) as stream:
            pieces = [event.text for event in stream if isinstance(event, vlcache.Delta)]
        whole, there = "".join(pieces), len("".join(pieces[: AHEAD + 1]))
        stop = whole[there - 2 : there + 2]
        cut = client.generate(sample.question, sampling=endless(40, stop=(stop,)), **asked)
    assert cut.text == whole[: whole.index(stop)]
    stack.wait_idle()
