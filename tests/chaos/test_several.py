"""Several answers of one prompt while their workers die: each goes on behind what its client has."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace

import pytest
import vlcache

from tests.chaos.crowd import Answer, Crowd, Question, ask, greedy_and_seeded
from tests.chaos.failovers import failovers
from tests.chaos.test_decode_worker import is_seen
from tests.integration.running_stack import RunningStack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

CHOICES = 3


@pytest.fixture(scope="module")
def several() -> list[Question]:
    """Greedy, sampled and punished for what was said; the answers of each request end at different times."""
    questions = greedy_and_seeded(4, tokens=300)
    return [replace(each, sampling=replace(each.sampling, n=CHOICES, stop=("fx",))) for each in questions]


@pytest.fixture(scope="module")
def quiet(running: RunningStack, several: list[Question]) -> list[Answer]:
    return asyncio.run(ask(running.address, several))


def check_each(answers: list[Answer], quiet: list[Answer]) -> None:
    """Nothing is missing, doubled or another's, in what came piece by piece as in the whole."""
    for answer, twin in zip(answers, quiet, strict=True):
        assert answer.completion is not None
        assert twin.completion is not None
        assert len(answer.completion.choices) == CHOICES
        deltas = [event for event in answer.events if isinstance(event, vlcache.Delta)]
        for number, (mine, other) in enumerate(zip(answer.completion.choices, twin.completion.choices, strict=True)):
            assert (mine.text, mine.token_ids, mine.finish_reason) == (other.text, other.token_ids, other.finish_reason)
            pieces = [delta for delta in deltas if delta.choice == number]
            assert tuple(token for piece in pieces for token in piece.token_ids) == mine.token_ids
            assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [mine.finish_reason]
        assert answer.completion.usage == twin.completion.usage
        for kind in (vlcache.Started, vlcache.Compressed, vlcache.Transferred, vlcache.Finished):
            assert answer.count(kind) == 1, kind


def test_a_decode_worker_dies(stack: RunningStack, several: list[Question], quiet: list[Answer]) -> None:
    async def main() -> None:
        async with Crowd(stack.address, several) as crowd:
            await crowd.reached(vlcache.Delta, 40)
            stack.kill("decode-0")
            check_each(await crowd.answers(), quiet)

    before = failovers(stack, "resend")
    asyncio.run(main())
    assert failovers(stack, "resend") > before


def test_a_decode_worker_dies_after_the_parcels_holder(
    stack: RunningStack, several: list[Question], quiet: list[Answer]
) -> None:
    """All prompts are computed by the one that dies: the other one sleeps meanwhile."""

    async def main() -> None:
        stack.kill("prefill-1", signal.SIGSTOP)
        try:
            await is_seen(stack, "prefill-1", "unreachable")
            async with Crowd(stack.address, several) as crowd:
                await crowd.reached(vlcache.Delta, 20)
                stack.kill("prefill-1", signal.SIGCONT)
                await is_seen(stack, "prefill-1", "ready")
                stack.kill("prefill-0")
                await crowd.reached(vlcache.Delta, 60)
                stack.kill("decode-0")
                check_each(await crowd.answers(), quiet)
        finally:
            stack.kill("prefill-1", signal.SIGCONT)

    before = failovers(stack, "reprefill")
    asyncio.run(main())
    assert failovers(stack, "reprefill") > before


def test_a_worker_that_leaves_hands_its_answers_on(
    stack: RunningStack, several: list[Question], quiet: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(stack.address, several) as crowd:
            await crowd.reached(vlcache.Delta, 40)
            stack.kill("decode-0", signal.SIGTERM)
            check_each(await crowd.answers(), quiet)

    before = failovers(stack, "migration")
    asyncio.run(main())
    assert failovers(stack, "migration") > before
