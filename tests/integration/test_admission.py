"""A decode worker with room for one request, and a router that keeps few waiting: who is let in, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import vlcache
from vlcache.v1 import inference_pb2 as pb

from models.shapes_vlm.questions import draw_samples
from router.validation import accept
from tests.integration.running_stack import RunningStack
from tests.integration.test_lowering import room_for
from tests.integration.test_shadow import ShadowingRouter
from tests.unit.router.test_process import router

SAMPLE = next(iter(draw_samples(seed=990_031, count=1)))
# Long enough to stand in the others' way until it is told to leave.
NEW_TOKENS = 2000
LIMITS = ("--max-waiting", "4", "--tenant-concurrency", "3")


@pytest.fixture(scope="module")
def limited(memory_stack: RunningStack) -> Iterator[ShadowingRouter]:
    """A second router in front of the stack's workers."""
    workers = ",".join(service.address for service in memory_stack.services if service.role != "router")
    with router("--registry", f"static://{workers}", *LIMITS) as (_, line):
        yield ShadowingRouter(line["address"], line["metrics"])


def room_for_one(stack: RunningStack) -> int:
    """Tokens that one request asks memory for, and a few more."""
    model = next(info.model for info in stack.worker_infos() if info.role == "prefill")
    parts = [*[pb.Part(image=pb.Image(data=b"png"))] * len(SAMPLE.images), pb.Part(text=SAMPLE.question)]
    message = pb.GenerateRequest(messages=[pb.Message(role="user", parts=parts)])
    return accept(message, model).offers[0].kept_tokens_bound + NEW_TOKENS + 32


def question(**more: Any) -> dict[str, Any]:
    return {"prompt": SAMPLE.question, "images": SAMPLE.images, **more}


class Crowd:
    """Clients of several tenants in one event loop."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._clients: dict[str, vlcache.AsyncClient] = {}
        self.answered: list[str] = []

    def of(self, tenant: str) -> vlcache.AsyncClient:
        if tenant not in self._clients:
            once = vlcache.RetryPolicy(max_attempts=1)
            self._clients[tenant] = vlcache.AsyncClient(self._address, tenant=tenant, retry=once)
        return self._clients[tenant]

    async def ask(self, tenant: str, name: str, priority: int = 0) -> None:
        """Ends by itself, but is promised as much as the first one."""
        sampling = vlcache.Sampling(max_new_tokens=NEW_TOKENS)
        await self.of(tenant).generate(**question(sampling=sampling, priority=priority))
        self.answered.append(name)

    async def refusal(self, tenant: str) -> vlcache.VlcacheError:
        with pytest.raises(vlcache.ResourceExhausted) as caught:
            await self.of(tenant).generate(**question())
        return caught.value

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()


async def scenario(limited: ShadowingRouter) -> list[str]:
    crowd = Crowd(limited.address)
    await crowd.of("a").wait_ready(20)
    endless = vlcache.Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    waiting = []

    async def line_up(tenant: str, name: str, priority: int = 0) -> None:
        waiting.append(asyncio.create_task(crowd.ask(tenant, name, priority)))
        while await asyncio.to_thread(limited.metric, "num_requests_waiting") < len(waiting):
            assert not waiting[-1].done(), await waiting[-1]
            await asyncio.sleep(0.01)

    async with crowd.of("a").stream(**question(sampling=endless)) as first:
        await anext(first)
        await line_up("a", "a1")
        await line_up("a", "a2")
        too_many = await crowd.refusal("a")
        assert too_many.reason == "TENANT_CONCURRENCY"
        await line_up("b", "b1")
        await line_up("c", "urgent", priority=-1)
        queue_full = await crowd.refusal("d")
        assert (queue_full.reason, queue_full.details["stage"]) == ("QUEUE_FULL", "queue")
        for error in (too_many, queue_full):
            assert error.retry_after_s is not None
            assert 0.5 <= error.retry_after_s <= 30
        assert crowd.answered == []
    await asyncio.gather(*waiting)
    await crowd.close()
    return crowd.answered


def test_the_urgent_first_then_tenants_in_turn_and_the_rest_is_told_when(
    limited: ShadowingRouter, memory_stack: RunningStack
) -> None:
    with room_for(memory_stack, room_for_one(memory_stack)):
        assert asyncio.run(scenario(limited)) == ["urgent", "a1", "b1", "a2"]
    assert limited.metric("tenant_requests_refused_total") == 2
    assert limited.metric("tenant_requests_running") == limited.metric("tenant_requests_waiting") == 0
    memory_stack.wait_idle()
