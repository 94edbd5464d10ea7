"""protocol: "corrupted chunk", "Redis gone", and connections that are cut: workers that only a network reaches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest
import vlcache

from deploy.local.forks import Forks
from router.config import RouterConfig
from router.router import Router
from tests.chaos.conftest import wait_until
from tests.chaos.crowd import Answer, Crowd, Question, ask, check_same
from tests.chaos.proxy import Proxy
from tests.integration.conftest import stack_config
from tests.integration.redis_server import RedisServer
from tests.integration.running_stack import RunningStack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

ALWAYS = 1_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture(scope="module")
def network(server: RedisServer, forks: Forks) -> Iterator[RunningStack]:
    """Parcels travel over gRPC, and only Redis knows the workers."""
    config = stack_config(
        "grpc",
        decode_workers=2,
        registry=server.location,
        prefill_flags=("--parcel-lease-s", "4"),
        router_flags=("--poll-interval-s", "0.2", "--slow-start-s", "0"),
    )
    with RunningStack(config, forks) as stack:
        yield stack
    assert stack.clean, "a process did not end with exit code 0"


@pytest.fixture
def idle_afterwards(network: RunningStack) -> Iterator[None]:
    yield
    network.wait_idle()


@pytest.fixture(scope="module")
def few(questions: list[Question]) -> list[Question]:
    return questions[:4]


@pytest.fixture(scope="module")
def expected(network: RunningStack, few: list[Question]) -> list[Answer]:
    return asyncio.run(ask(network.address, few))


@contextlib.asynccontextmanager
async def through_proxies(network: RunningStack) -> AsyncIterator[tuple[Router, list[Proxy]]]:
    """A router to which the decode workers are behind proxies, also for parcels."""
    addresses = [service.address for service in network.services if service.role == "prefill"]
    decode = [service.address for service in network.services if service.role == "decode"]
    async with contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(address)) for address in decode]
        listed = ",".join([*addresses, *(proxy.address for proxy in proxies)])
        router = Router(RouterConfig(registry=f"static://{listed}", name="proxied", poll_interval_s=0.2, drain_s=5.0))
        await router.start()
        stack.push_async_callback(router.stop)
        async with vlcache.AsyncClient(router.address) as client:
            await client.wait_ready(20)
        yield router, proxies
        await router.settle(5.0)
        router.check_integrity()


@pytest.mark.usefixtures("idle_afterwards")
def test_corrupted_chunk_is_sent_again(network: RunningStack, few: list[Question], expected: list[Answer]) -> None:
    async def main() -> None:
        async with through_proxies(network) as (router, proxies):
            damage(proxies, 1)
            check_same(await ask(router.address, few), expected)
            assert not any(proxy.flips for proxy in proxies)

    before = data_losses(network)
    asyncio.run(main())
    assert data_losses(network) > before


@pytest.mark.usefixtures("idle_afterwards")
def test_what_is_damaged_twice_is_computed_anew(
    network: RunningStack, few: list[Question], expected: list[Answer]
) -> None:
    async def main() -> None:
        async with through_proxies(network) as (router, proxies):
            damage(proxies, ALWAYS)
            asked = asyncio.create_task(ask(router.address, few[:1]))
            while not asked.done():
                if reprefills(router):
                    break
                await asyncio.sleep(0.005)
            damage(proxies, 0)
            check_same(await asked, expected[:1])
            assert reprefills(router) > 0

    before = data_losses(network)
    asyncio.run(main())
    assert data_losses(network) > before


def damage(proxies: list[Proxy], flips: int) -> None:
    for proxy in proxies:
        proxy.flips = flips


def reprefills(router: Router) -> float:
    samples = [sample for family in router.metrics.failovers.collect() for sample in family.samples]
    return sum(each.value for each in samples if each.name.endswith("_total") and each.labels["kind"] == "reprefill")


@pytest.mark.usefixtures("idle_afterwards")
def test_cut_connections_cost_no_answer(network: RunningStack, few: list[Question], expected: list[Answer]) -> None:
    async def main() -> None:
        async with through_proxies(network) as (router, proxies), Crowd(router.address, few) as crowd:
            await crowd.reached(vlcache.Delta, 20)
            assert sum(proxy.cut() for proxy in proxies) > 0
            check_same(await crowd.answers(), expected)

    asyncio.run(main())


@pytest.mark.usefixtures("idle_afterwards")
def test_redis_gone_is_noticed_by_nobody(
    network: RunningStack, server: RedisServer, few: list[Question], expected: list[Answer]
) -> None:
    async def main() -> None:
        async with Crowd(network.address, few) as crowd:
            await crowd.reached(vlcache.Delta, 10)
            await asyncio.to_thread(server.stop)
            check_same(await crowd.answers(), expected)
        check_same(await ask(network.address, few), expected)
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(wait_until, lambda: known_workers(server) == 3)
        check_same(await ask(network.address, few), expected)

    asyncio.run(main())


def known_workers(server: RedisServer) -> int:
    with server.admin() as client:
        return len(client.keys("vlcache:worker:*"))


def data_losses(network: RunningStack) -> float:
    """Parcels that were sent once more because bytes had changed."""
    lines = [line for line in network.metrics("prefill").splitlines() if line.startswith("vlcache_kv_resend_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'reason="data_loss"' in line)
