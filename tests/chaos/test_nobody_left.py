"""protocol: "no worker of a role left", "worker restarted under the same address", "client disconnects", and all."""

from __future__ import annotations

import asyncio
import time

import pytest
import vlcache

from tests.chaos.crowd import Answer, Crowd, Question, ask, check_same
from tests.integration.running_stack import RunningStack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

AT_ONCE_S = 10.0
ONCE = vlcache.RetryPolicy(max_attempts=1)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_worker_of_a_role_left_fails_fast(stack: RunningStack, questions: list[Question], role: str) -> None:
    """Running streams and new requests hear UNAVAILABLE, and nobody hangs."""

    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Started)
            for number in (0, 1):
                stack.kill(f"{role}-{number}")
            began_s = time.monotonic()
            with pytest.raises(vlcache.Unavailable):
                await crowd.answers()
        async with vlcache.AsyncClient(stack.address, retry=ONCE) as client:
            with pytest.raises(vlcache.Unavailable):
                await client.generate("Hello")
        assert time.monotonic() - began_s < AT_ONCE_S

    asyncio.run(main())


def test_worker_restarted_under_the_same_address_is_told_apart(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    """It remembers nothing of what the router still believes of it."""

    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Delta, 5)
            stack.kill("decode-1")
            await asyncio.to_thread(stack.restart, "decode-1")
            check_same(await crowd.answers(), undisturbed)
        check_same(await ask(stack.address, questions[:2]), undisturbed[:2])

    asyncio.run(main())


def test_client_disconnects_while_its_worker_dies(stack: RunningStack, questions: list[Question]) -> None:
    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Delta, 5)
            stack.kill("decode-0")

    asyncio.run(main())


def test_everything_dies_at_once_and_comes_back(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(stack.address, questions) as crowd:
            await crowd.reached(vlcache.Delta)
            for name in ("router", "prefill-0", "decode-0", "prefill-1", "decode-1"):
                stack.kill(name)
            with pytest.raises(vlcache.VlcacheError):
                await crowd.answers()
        await asyncio.to_thread(stack.restart, "prefill-0", "prefill-1", "decode-0", "decode-1", "router")
        async with vlcache.AsyncClient(stack.address) as client:
            await client.wait_ready(30)
        check_same(await ask(stack.address, questions[:2]), undisturbed[:2])

    asyncio.run(main())
