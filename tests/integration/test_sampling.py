"""Sampling through the service: a seed names one stream, alone or in a batch, and every ending is the right one."""

from __future__ import annotations

import asyncio

import pytest
import torch
import vlcache

from models.shapes_vlm.questions import draw_samples
from tests.integration.reference import Reference
from tests.integration.running_stack import RunningStack

PROMPT = "What is the code on the red plate?"


def hot(seed: int | None = None, **more: object) -> vlcache.Sampling:
    return vlcache.Sampling(max_new_tokens=24, temperature=1.5, seed=seed, ignore_eos=True, **more)


def test_a_seed_names_one_stream(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client:
        first, second, other = (client.generate(PROMPT, sampling=hot(seed)) for seed in (7, 7, 8))
    assert first.token_ids == second.token_ids
    assert first.token_ids != other.token_ids
    assert first.seed == 7


def test_a_drawn_seed_is_returned_and_reproduces_the_answer(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client:
        drawn = client.generate(PROMPT, sampling=hot())
        again = client.generate(PROMPT, sampling=hot(drawn.seed))
    assert again.token_ids == drawn.token_ids


def test_a_seeded_stream_is_the_same_in_a_batch(memory_stack: RunningStack) -> None:
    async def batch() -> list[vlcache.Completion]:
        async with memory_stack.async_client() as client:
            return await asyncio.gather(*(client.generate(PROMPT, sampling=hot(seed)) for seed in (1, 2, 3, 4)))

    with memory_stack.client() as client:
        alone = [client.generate(PROMPT, sampling=hot(seed)).token_ids for seed in (1, 2, 3, 4)]
    assert [answer.token_ids for answer in asyncio.run(batch())] == alone


def test_top_k_one_is_greedy(memory_stack: RunningStack) -> None:
    greedy = vlcache.Sampling(max_new_tokens=24, ignore_eos=True)
    with memory_stack.client() as client:
        assert (
            client.generate(PROMPT, sampling=hot(3, top_k=1)).token_ids
            == client.generate(PROMPT, sampling=greedy).token_ids
        )


def test_max_new_tokens_ends_with_length(stack: RunningStack) -> None:
    with stack.client() as client:
        for limit in (1, 2, 9):
            answer = client.generate(PROMPT, sampling=vlcache.Sampling(max_new_tokens=limit, ignore_eos=True))
            assert len(answer.token_ids) == limit
            assert answer.usage.generated_tokens == limit
            assert answer.finish_reason is vlcache.FinishReason.LENGTH


def test_a_stop_string_cuts_the_text(stack: RunningStack) -> None:
    sampling = vlcache.Sampling(max_new_tokens=40, ignore_eos=True)
    with stack.client() as client:
        whole = client.generate(PROMPT, sampling=sampling).text
        stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
        cut = client.generate(PROMPT, sampling=vlcache.Sampling(max_new_tokens=40, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason is vlcache.FinishReason.STOP
    stack.wait_idle()


def test_the_stream_carries_the_text_of_the_answer(stack: RunningStack) -> None:
    with stack.client() as client, client.stream(PROMPT, sampling=hot(11)) as stream:
        events = list(stream)
        result = stream.result()
    assert "".join(event.text for event in events if isinstance(event, vlcache.Delta)) == result.text
    assert isinstance(events[0], vlcache.Started)
    assert isinstance(events[-1], vlcache.Finished)
    assert sum(isinstance(event, vlcache.Compressed) for event in events) == 1
    assert sum(isinstance(event, vlcache.Transferred) for event in events) == 1


EVERYTHING = vlcache.Compression(retention=1.0)
BIAS = {40: 3.0, 41: -9.0}
CHANGED = vlcache.Sampling(
    max_new_tokens=16,
    ignore_eos=True,
    presence_penalty=0.7,
    frequency_penalty=0.4,
    repetition_penalty=1.6,
    logit_bias=BIAS,
)


def changed(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """What `CHANGED` makes of logits, token by token."""
    logits = logits.clone()
    for token, bias in BIAS.items():
        logits[token] += bias
    for token in {*prompt, *answer}:
        logits[token] = logits[token] / 1.6 if logits[token] > 0 else logits[token] * 1.6
    for token in set(answer):
        logits[token] -= 0.7 + 0.4 * answer.count(token)
    return logits


def test_penalties_and_bias_reach_every_token_on_both_sides(stack: RunningStack, reference: Reference) -> None:
    """The prompt's tokens, too, which the decode worker has never seen."""
    (sample,) = draw_samples(seed=990_007, count=1)
    prompt = reference.inputs(sample.question, sample.images)["input_ids"][0].tolist()
    expected: list[int] = []
    for _ in range(16):
        logits = reference.logits(sample.question, sample.images, expected)[-1]
        expected.append(int(changed(logits, prompt, expected).argmax()))
    plain = vlcache.Sampling(max_new_tokens=16, ignore_eos=True)
    with stack.client() as client:
        answer = client.generate(sample.question, images=sample.images, sampling=CHANGED, compression=EVERYTHING)
        other = client.generate(sample.question, images=sample.images, sampling=plain, compression=EVERYTHING)
    assert list(answer.token_ids) == expected
    assert answer.token_ids != other.token_ids


def test_logprobs_are_those_of_one_process(stack: RunningStack, reference: Reference) -> None:
    (sample,) = draw_samples(seed=990_008, count=1)
    sampling = vlcache.Sampling(max_new_tokens=12, ignore_eos=True, temperature=1.2, seed=5, logprobs=4)
    with stack.client() as client:
        answer = client.generate(sample.question, images=sample.images, sampling=sampling, compression=EVERYTHING)
    expected = reference.logits(sample.question, sample.images, answer.token_ids).log_softmax(dim=-1)
    assert [each.token.token_id for each in answer.logprobs] == list(answer.token_ids)
    for place, each in enumerate(answer.logprobs):
        assert each.token.logprob == pytest.approx(float(expected[place, each.token.token_id]), abs=2e-4)
        best = expected[place].topk(4)
        assert [likely.logprob for likely in each.top] == pytest.approx(best.values.tolist(), abs=2e-4)
    assert "".join(each.token.text for each in answer.logprobs).replace("</s>", "") == answer.text


def test_an_answer_is_not_shorter_than_asked(stack: RunningStack) -> None:
    (sample,) = draw_samples(seed=990_009, count=1)
    with stack.client() as client:
        short = client.generate(sample.question, images=sample.images)
        assert short.finish_reason is vlcache.FinishReason.STOP
        length = len(short.token_ids)
        sampling = vlcache.Sampling(max_new_tokens=length + 20, min_new_tokens=length + 5)
        longer = client.generate(sample.question, images=sample.images, sampling=sampling)
    assert len(longer.token_ids) >= length + 5
    assert longer.token_ids[: length - 1] == short.token_ids[:-1]


def test_a_bias_for_a_token_that_is_none_is_refused(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client, pytest.raises(vlcache.InvalidRequest, match="logit_bias names token 70000"):
        client.generate(PROMPT, sampling=vlcache.Sampling(logit_bias={70_000: 1.0}))
    memory_stack.wait_idle()
