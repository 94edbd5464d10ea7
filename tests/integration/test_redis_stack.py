"""Real processes that find each other through a real Redis, which may go and come back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import vlcache

from deploy.local.forks import Forks
from router.config import RouterConfig
from router.router import Router
from shared.registry.redis_listing import EXPIRY_S
from tests.integration.conftest import stack_config
from tests.integration.redis_server import RedisServer
from tests.integration.running_stack import RunningStack

SHORT = vlcache.Sampling(max_new_tokens=3)
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture(scope="module")
def stack(server: RedisServer, forks: Forks) -> Iterator[RunningStack]:
    """Workers that only Redis knows of; in the end all have signed off."""
    with RunningStack(stack_config("auto", registry=server.location), forks) as running:
        yield running
    assert workers_in(server) == {}


def workers_in(server: RedisServer) -> dict[str, dict[str, object]]:
    """What Redis holds of every worker, by name."""
    with server.admin() as client:
        values = client.mget(keys) if (keys := client.keys("vlcache:worker:*")) else []
    entries = [json.loads(value) for value in values if value is not None]
    return {entry["worker"]["name"]: entry for entry in entries}


def wait_until(met: Callable[[], bool]) -> float:
    """The seconds until it was."""
    started = time.monotonic()
    while not met():
        assert time.monotonic() < started + PATIENCE_S
        time.sleep(0.05)
    return time.monotonic() - started


@contextlib.asynccontextmanager
async def another_router(server: RedisServer) -> AsyncIterator[vlcache.AsyncClient]:
    """A client of one more router over the same workers."""
    router = Router(RouterConfig(registry=server.location, name="another", poll_interval_s=0.1))
    await router.start()
    try:
        async with vlcache.AsyncClient(router.address) as client:
            await client.wait_ready(PATIENCE_S)
            yield client
    finally:
        await router.stop()


def test_a_redis_that_goes_and_comes_back_empty_is_not_noticed(stack: RunningStack, server: RedisServer) -> None:
    async def main() -> None:
        async with stack.async_client() as client, another_router(server) as other:
            told = {name: entry["address"] for name, entry in workers_in(server).items()}
            assert told == {service.name: service.address for service in stack.services if service.role != "router"}
            server.stop()
            for _ in range(3):
                answers = await asyncio.gather(*(each.generate("Hello", sampling=SHORT) for each in (client, other)))
                assert all(answer.text for answer in answers)
            server.start()
            async with another_router(server) as late:
                assert (await late.generate("Hello", sampling=SHORT)).text == answers[0].text
            await asyncio.to_thread(wait_until, lambda: workers_in(server).keys() == told.keys())
            assert (await other.generate("Hello", sampling=SHORT)).text == answers[0].text

    asyncio.run(main())


def test_a_killed_worker_is_forgotten(stack: RunningStack, server: RedisServer) -> None:
    wait_until(lambda: len(workers_in(server)) == 2)
    os.kill(stack.child("decode-0").pid, signal.SIGKILL)
    with stack.client() as client:
        assert wait_until(lambda: "decode-0" not in workers_in(server)) < EXPIRY_S + 1
        wait_until(lambda: {worker.name for worker in client.info().workers} == {"prefill-0"})
