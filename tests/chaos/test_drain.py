"""protocol: "SIGTERM": under load, of one role after the other; nothing is lost and every exit code is 0."""

from __future__ import annotations

import asyncio

import pytest
import vlcache

from tests.chaos.crowd import Answer, Crowd, Question, ask, check_same
from tests.chaos.failovers import failovers
from tests.integration.running_stack import RunningStack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def test_sigterm_of_a_decode_worker_moves_its_sequences(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Delta, 10)
            codes = await asyncio.to_thread(stack.restart, "decode-0")
            check_same(await crowd.answers(), undisturbed)
        assert codes == [0]

    before = failovers(stack, "migration")
    asyncio.run(main())
    assert failovers(stack, "migration") > before


def test_sigterm_of_a_prefill_worker_lets_it_finish_what_it_has_begun(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Started)
            codes = await asyncio.to_thread(stack.restart, "prefill-0")
            check_same(await crowd.answers(), undisturbed)
        assert codes == [0]

    asyncio.run(main())


def test_sigterm_of_the_router_lets_its_requests_finish(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Delta)
            codes = await asyncio.to_thread(stack.restart, "router")
            check_same(await crowd.answers(), undisturbed)
        assert codes == [0]

    asyncio.run(main())


def test_a_rolling_restart_under_load_loses_nothing(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    """One worker after the other, while clients ask on and on."""

    async def main() -> None:
        rolling = asyncio.create_task(asyncio.to_thread(roll, stack))
        rounds = 0
        while not rolling.done():
            check_same(await ask(stack.address, questions[:2]), undisturbed[:2])
            rounds += 1
        assert await rolling == [0] * 4
        assert rounds > 1

    asyncio.run(main())


def roll(stack: RunningStack) -> list[int]:
    return [code for name in ("decode-0", "prefill-0", "decode-1", "prefill-1") for code in stack.restart(name)]
