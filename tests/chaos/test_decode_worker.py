"""protocol: "decode worker dies": no gap and no duplicate token, also without the parcel."""

from __future__ import annotations

import asyncio
import signal

import pytest
import vlcache

from tests.chaos.crowd import Answer, Crowd, Question, check_same
from tests.chaos.failovers import failovers
from tests.integration.running_stack import RunningStack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def test_decode_worker_dies_and_its_streams_go_on_elsewhere(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Delta, 20)
            stack.kill("decode-0")
            check_same(await crowd.answers(), undisturbed)

    before = failovers(stack, "resend")
    asyncio.run(main())
    assert failovers(stack, "resend") > before


def test_decode_worker_and_the_parcel_holder_die_in_turn(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    """All prompts are computed by the one that dies: the other one sleeps meanwhile."""

    async def main() -> None:
        stack.kill("prefill-1", signal.SIGSTOP)
        try:
            await is_seen(stack, "prefill-1", "unreachable")
            async with Crowd(stack.address, questions) as crowd:
                await crowd.reached(vlcache.Delta, 10)
                stack.kill("prefill-1", signal.SIGCONT)
                await is_seen(stack, "prefill-1", "ready")
                stack.kill("prefill-0")
                await crowd.reached(vlcache.Delta, 20)
                stack.kill("decode-0")
                check_same(await crowd.answers(), undisturbed)
        finally:
            stack.kill("prefill-1", signal.SIGCONT)

    before = failovers(stack, "reprefill")
    asyncio.run(main())
    assert failovers(stack, "reprefill") > before


async def is_seen(stack: RunningStack, name: str, state: str) -> None:
    """Waits until the router says so."""
    async with vlcache.AsyncClient(stack.address) as client:
        while True:
            states = {worker.name: worker.state for worker in (await client.info()).workers}
            if states[name] == state:
                return
            await asyncio.sleep(0.05)


def test_a_hung_decode_worker_is_given_up_and_disturbs_nobody_when_it_wakes(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Delta, 20)
            stack.kill("decode-0", signal.SIGSTOP)
            try:
                answers = await crowd.answers()
            finally:
                stack.kill("decode-0", signal.SIGCONT)
            check_same(answers, undisturbed)

    before = failovers(stack, "resend")
    asyncio.run(main())
    assert failovers(stack, "resend") > before
