"""A decode worker that promised far more memory than it has answers like one with memory for everyone."""

from __future__ import annotations

import asyncio

import pytest
import vlcache

from deploy.local.forks import Forks
from deploy.local.stack import StackConfig
from models.shapes_vlm.questions import draw_samples
from tests.integration.conftest import EXACT
from tests.integration.running_stack import RunningStack
from tests.integration.test_observability import samples_of

NEW_TOKENS = 110
# room for two of these answers, 8 KiB per token
OVERCOMMITTED = StackConfig(dtype=EXACT, decode_flags=("--promised-tokens", "2"), kv_memory_mib=2)


def requests() -> list[tuple[str, tuple[object, ...], vlcache.Sampling]]:
    """With images and without, greedy and sampled."""
    texts = [("Say something, anything, 1 2 3.", ()), ("What is the code?", ()), ("Go on and on and on", ())]
    pictures = [(sample.question, sample.images) for sample in draw_samples(seed=990_011, count=5)]
    return [
        (
            question,
            tuple(images),
            vlcache.Sampling(
                max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.8 if number % 2 else 0.0, seed=number
            ),
        )
        for number, (question, images) in enumerate([*texts, *pictures])
    ]


def ask_all_at_once(stack: RunningStack) -> list[list[int]]:
    async def main() -> list[list[int]]:
        async with stack.async_client() as client:
            answers = await asyncio.gather(
                *(
                    client.generate(question, images=images, sampling=sampling)
                    for question, images, sampling in requests()
                )
            )
        return [list(answer.token_ids) for answer in answers]

    return asyncio.run(main())


def decode_ahead_of_the_promise(stack: RunningStack) -> None:
    """Rows of more tokens would take the room of the step after them: they are drafted, not handed over."""
    sampling = vlcache.Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    with stack.client() as client:
        for tokens in (1, 2, 8):
            ahead = vlcache.Compression(policy="look_ahead", parameters={"tokens": tokens})
            answer = client.generate("What is the code?", sampling=sampling, compression=ahead)
            assert len(answer.token_ids) == NEW_TOKENS


@pytest.mark.heavy
def test_everyone_gets_the_tokens_of_an_unhurried_stack(memory_stack: RunningStack, forks: Forks) -> None:
    expected = ask_all_at_once(memory_stack)
    with RunningStack(OVERCOMMITTED, forks) as stack:
        answers = ask_all_at_once(stack)
        stack.wait_idle()
        decode_ahead_of_the_promise(stack)
        stack.wait_idle()
        metrics = stack.metrics("decode")
    assert stack.clean
    assert [len(answer) for answer in answers] == [NEW_TOKENS] * len(requests())
    assert answers == expected
    assert sum(samples_of(metrics, "vlcache_preemptions_total")) > 0
    assert sum(samples_of(metrics, "vlcache_kv_resident_bytes")) == 0
    assert 'state="parked"' in metrics
    assert samples_of(metrics, "vlcache_kv_fragmentation_ratio") == [0.0]
    assert sum(samples_of(memory_stack.metrics("decode"), "vlcache_preemptions_total")) == 0
