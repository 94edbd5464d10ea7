"""Sampling through the service: a seed names one stream, alone or in a batch, and every ending is the right one."""

from __future__ import annotations

import asyncio

import vlcache

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
