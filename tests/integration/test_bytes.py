"""What crosses from prefill to decode: never more than the retention promises, by the transport's own count."""

from __future__ import annotations

import asyncio

import pytest
import vlcache

from models.shapes_vlm.questions import draw_samples
from tests.integration.running_stack import RunningStack

PROMPTS = 240
CONCURRENT = 4


@pytest.mark.heavy
@pytest.mark.parametrize("transport", ["memory", "grpc"])
def test_sent_bytes_stay_within_retention_plus_one_percent(transport: str, request: pytest.FixtureRequest) -> None:
    stack: RunningStack = request.getfixturevalue(f"{transport}_stack")
    answers = asyncio.run(_ask_many(stack, PROMPTS // 2))
    assert len(answers) == PROMPTS // 2
    for answer in answers:
        compression, transfer = answer.compression, answer.transfer
        assert compression is not None
        if transfer is None:
            # the first token ended the answer: nothing was sent
            assert len(answer.token_ids) == 1
            continue
        full = compression.full_bytes
        assert compression.kept_bytes <= compression.requested_retention * full
        assert transfer.sent_bytes > compression.kept_bytes
        assert transfer.sent_bytes <= compression.requested_retention * full + 0.01 * full
    assert sum(answer.transfer is not None for answer in answers) > len(answers) // 2


async def _ask_many(stack: RunningStack, count: int) -> list[vlcache.Completion]:
    retentions = (0.05, 0.1, 0.1, 0.25)
    turns = asyncio.Semaphore(CONCURRENT)

    async with stack.async_client() as client:

        async def ask(index: int, sample: object) -> vlcache.Completion:
            async with turns:
                return await client.generate(
                    sample.question,
                    images=sample.images,
                    sampling=vlcache.Sampling(max_new_tokens=2),
                    compression=vlcache.Compression(retention=retentions[index % len(retentions)]),
                )

        samples = enumerate(draw_samples(seed=990_002, count=count))
        return list(await asyncio.gather(*(ask(index, sample) for index, sample in samples)))


def test_max_kept_tokens_is_exact(memory_stack: RunningStack) -> None:
    sample = next(iter(draw_samples(seed=990_003, count=1)))
    with memory_stack.client() as client:
        answer = client.generate(
            sample.question,
            images=sample.images,
            sampling=vlcache.Sampling(max_new_tokens=2, ignore_eos=True),
            compression=vlcache.Compression(max_kept_tokens=40),
        )
    assert answer.compression is not None
    layers = answer.compression.layer_tokens
    assert sum(layers) == 40 * len(layers)


def test_retention_one_sends_everything(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client:
        answer = client.generate(
            "Hello", compression=vlcache.Compression(retention=1.0), sampling=vlcache.Sampling(ignore_eos=True)
        )
    assert answer.compression is not None
    assert answer.compression.kept_bytes == answer.compression.full_bytes
    assert answer.compression.realised_retention == 1.0
