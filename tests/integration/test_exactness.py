"""Retention 1.0 through three real processes is transformers' `generate`, token for token."""

from __future__ import annotations

import asyncio

import pytest
import vlcache

from models.shapes_vlm.questions import Sample, draw_samples
from tests.integration.reference import Reference
from tests.integration.running_stack import RunningStack

EVERYTHING = vlcache.Compression(retention=1.0)
TEXTS = ("What is the code?", "Say something, anything, 1 2 3.")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(draw_samples(seed=990_001, count=7))


def test_every_task_alone(stack: RunningStack, reference: Reference, samples: list[Sample]) -> None:
    sampling = vlcache.Sampling(max_new_tokens=48)
    with stack.client() as client:
        for sample in samples:
            answer = client.generate(sample.question, images=sample.images, sampling=sampling, compression=EVERYTHING)
            expected = reference.generate(sample.question, sample.images, max_new_tokens=48)
            assert list(answer.token_ids) == expected, sample.task


def test_text_only_beyond_the_end_of_the_sequence(stack: RunningStack, reference: Reference) -> None:
    sampling = vlcache.Sampling(max_new_tokens=32, ignore_eos=True)
    with stack.client() as client:
        for text in TEXTS:
            answer = client.generate(text, sampling=sampling, compression=EVERYTHING)
            assert list(answer.token_ids) == reference.generate(text, (), max_new_tokens=32, ignore_eos=True)
            assert answer.usage.visual_tokens == 0


def test_a_mixed_batch_equals_each_alone(stack: RunningStack, reference: Reference, samples: list[Sample]) -> None:
    """All at once: sequences of several lengths join and leave one running batch."""
    questions = [(sample.question, sample.images) for sample in samples[:5]] + [(text, ()) for text in TEXTS]

    async def ask_all() -> list[vlcache.Completion]:
        async with stack.async_client() as client:
            asked = [
                client.generate(
                    question,
                    images=images,
                    sampling=vlcache.Sampling(max_new_tokens=24 + index, ignore_eos=True),
                    compression=EVERYTHING,
                )
                for index, (question, images) in enumerate(questions)
            ]
            return await asyncio.gather(*asked)

    for index, (answer, (question, images)) in enumerate(zip(asyncio.run(ask_all()), questions, strict=True)):
        expected = reference.generate(question, images, max_new_tokens=24 + index, ignore_eos=True)
        assert list(answer.token_ids) == expected, question


def test_the_transport_is_the_one_that_was_chosen(memory_stack: RunningStack, grpc_stack: RunningStack) -> None:
    for name, stack in (("memory", memory_stack), ("grpc", grpc_stack)):
        with stack.client() as client:
            answer = client.generate(TEXTS[0], sampling=vlcache.Sampling(max_new_tokens=2, ignore_eos=True))
        assert answer.transfer is not None
        assert answer.transfer.transport == name


def test_both_transports_give_the_same_compressed_answer(
    memory_stack: RunningStack, grpc_stack: RunningStack, samples: list[Sample]
) -> None:
    answers = []
    for stack in (memory_stack, grpc_stack):
        with stack.client() as client:
            answers.append(client.generate(samples[0].question, images=samples[0].images))
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].compression == answers[1].compression


def test_a_request_for_text_after_one_with_images_is_unaffected(
    memory_stack: RunningStack, reference: Reference, samples: list[Sample]
) -> None:
    sampling = vlcache.Sampling(max_new_tokens=12, ignore_eos=True)
    with memory_stack.client() as client:
        client.generate(samples[0].question, images=samples[0].images, sampling=sampling)
        answer = client.generate(TEXTS[0], sampling=sampling, compression=EVERYTHING)
    assert list(answer.token_ids) == reference.generate(TEXTS[0], (), max_new_tokens=12, ignore_eos=True)
