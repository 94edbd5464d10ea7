"""protocol: "router dies": its workers clean up by lease, and the same request is answered by another router."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
import vlcache

from router.config import RouterConfig
from router.router import Router
from tests.chaos.crowd import TIMEOUT, Answer, Question, check_same
from tests.integration.running_stack import RunningStack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

REQUEST_ID = "asked-twice"


@pytest.fixture
def question(questions: list[Question]) -> Question:
    return questions[1]


@contextlib.asynccontextmanager
async def another_router(stack: RunningStack) -> AsyncIterator[Router]:
    """One more, in this process, over the same workers."""
    addresses = ",".join(service.address for service in stack.services if service.role != "router")
    router = Router(RouterConfig(registry=f"static://{addresses}", name="another", poll_interval_s=0.2, drain_s=5.0))
    await router.start()
    try:
        yield router
        await router.settle(5.0)
        router.check_integrity()
    finally:
        await router.stop()


async def read(client: vlcache.AsyncClient, question: Question, answer: Answer, at_20: Callable[[], None]) -> None:
    """Asks under `REQUEST_ID`; `at_20` is called once, when so many tokens have come."""
    sample, calls = question.sample, iter([at_20])
    async with client.stream(
        sample.question, images=sample.images, sampling=question.sampling, request_id=REQUEST_ID
    ) as stream:
        async for event in stream:
            answer.events.append(event)
            if len(answer.token_ids) >= 20:
                next(calls, lambda: None)()
        answer.completion = await stream.result()


def test_router_dies_and_the_same_request_is_answered_by_another(
    stack: RunningStack, question: Question, undisturbed: list[Answer]
) -> None:
    """The client knows both routers; what the first one had begun, nobody holds after a lease."""

    async def main() -> None:
        async with another_router(stack) as second:
            both = f"ipv4:{stack.address},{second.address}"
            async with vlcache.AsyncClient(both, timeout=TIMEOUT) as client:
                await client.wait_ready(20)
                first = Answer()
                with pytest.raises(vlcache.Unavailable) as caught:
                    await read(client, question, first, at_20=lambda: stack.kill("router"))
                assert caught.value.request_id == REQUEST_ID
                assert caught.value.code == grpc.StatusCode.UNAVAILABLE
                again = Answer()
                await read(client, question, again, at_20=lambda: None)
        assert first.token_ids == again.token_ids[: len(first.token_ids)]
        check_same([again], undisturbed[1:2])

    asyncio.run(main())
