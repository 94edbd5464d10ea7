"""protocol: "prefill worker dies": before the first token, while the parcel travels, and when it has arrived."""

from __future__ import annotations

import asyncio
import signal

import pytest
import vlcache

from tests.chaos.conftest import wait_until
from tests.chaos.crowd import Answer, Crowd, Question, check_same
from tests.chaos.failovers import failovers
from tests.integration.running_stack import RunningStack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

DECODE_WORKERS = ("decode-0", "decode-1")


def sender(stack: RunningStack) -> str:
    """The prefill worker that has a parcel on its way, once there is one."""
    senders: list[str] = []

    def found() -> bool:
        infos = stack.worker_infos("prefill")
        senders[:] = [info.name for info in infos if info.kv.filling]
        return bool(senders)

    wait_until(found)
    return senders[0]


def test_prefill_worker_dies_before_the_first_token(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    """It is stopped first, so that what it was given is surely unanswered when it dies."""

    async def main() -> None:
        stack.kill("prefill-0", signal.SIGSTOP)
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Started)
            await asyncio.sleep(0.3)
            assert any(not stream.token_ids for stream in crowd.streams)
            stack.kill("prefill-0")
            check_same(await crowd.answers(), undisturbed)

    before = failovers(stack, "reprefill")
    asyncio.run(main())
    assert failovers(stack, "reprefill") > before


def test_prefill_worker_dies_during_a_transfer(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    """Nobody takes parcels while the decode workers are stopped: what is complete is on its way and stays there."""

    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.someone(lambda stream: bool(stream.token_ids))
            for name in DECODE_WORKERS:
                stack.kill(name, signal.SIGSTOP)
            try:
                stack.kill(await asyncio.to_thread(sender, stack))
            finally:
                for name in DECODE_WORKERS:
                    stack.kill(name, signal.SIGCONT)
            check_same(await crowd.answers(), undisturbed)

    before = failovers(stack, "reprefill")
    asyncio.run(main())
    assert failovers(stack, "reprefill") > before


def test_prefill_worker_dies_after_the_transfer_and_nobody_notices(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Transferred)
            stack.kill("prefill-0")
            check_same(await crowd.answers(), undisturbed)

    before = failovers(stack, "reprefill") + failovers(stack, "resend")
    asyncio.run(main())
    assert failovers(stack, "reprefill") + failovers(stack, "resend") == before


def test_a_hung_prefill_worker_is_given_up_and_disturbs_nobody_when_it_wakes(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    async def main() -> None:
        stack.kill("prefill-0", signal.SIGSTOP)
        try:
            async with Crowd(stack.address, questions) as crowd:
                answers = await crowd.answers()
        finally:
            stack.kill("prefill-0", signal.SIGCONT)
        check_same(answers, undisturbed)

    before = failovers(stack, "reprefill")
    asyncio.run(main())
    assert failovers(stack, "reprefill") > before
