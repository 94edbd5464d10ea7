"""The worker table: who is seen, who is gone, and what health says about it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from vlcache.v1 import inference_pb2 as pb

from router.background import Background
from router.workers.client import WorkerClient
from router.workers.table import WorkerTable
from shared.errors import InternalError
from tests.unit.router.fakes import Bench, FakeDecode, FakePrefill, bench, kinds, run
from tests.unit.router.fleet import Clock

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_becomes(b: Bench, wanted: int) -> None:
    """Watches until the answer is `wanted`; `run` limits the time."""
    watch = health_pb2_grpc.HealthStub(b.channel).Watch(health_pb2.HealthCheckRequest())
    while (await watch.read()).status != wanted:
        pass
    watch.cancel()


def test_health_follows_the_workers() -> None:
    async def main() -> None:
        async with bench() as b:
            await health_becomes(b, SERVING)
            b.decode[0].info.state = "draining"
            await health_becomes(b, NOT_SERVING)
            b.decode[0].info.state = "ready"
            await health_becomes(b, SERVING)
            await b.prefill[0].stop()
            await health_becomes(b, NOT_SERVING)
            # the same worker comes back under the same address
            await b.prefill[0].start(int(b.prefill[0].address.rpartition(":")[2]))
            await health_becomes(b, SERVING)

    run(main)


def test_states_are_shown_to_operators() -> None:
    async def main() -> None:
        prefill = [FakePrefill("prefill-0"), FakePrefill("prefill-1")]
        async with bench(prefill) as b:
            prefill[1].info.state = "draining"
            await b.becomes(lambda: b.worker("prefill-1").state == "draining")
            info = await b.stub.GetServerInfo(pb.GetServerInfoRequest())
            states = {worker.name: worker.state for worker in info.workers}
            assert states == {"prefill-0": "ready", "prefill-1": "draining", "decode-0": "ready"}
            await b.becomes(lambda: b.metric("worker_state", name="prefill-1", state="draining") == 1)
            assert b.metric("worker_state", name="prefill-1", state="ready") == 0
            # a draining worker gets no new request
            for _ in range(3):
                assert (await b.answer())[-1].finished.placement.prefill_worker == "prefill-0"

    run(main)


def test_an_address_nobody_answers_at_is_unreachable() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.decode[0].stop()
            await b.becomes(lambda: b.worker("decode-0").state == "unreachable")
            info = await b.stub.GetServerInfo(pb.GetServerInfoRequest())
            assert {worker.name: worker.state for worker in info.workers}["decode-0"] == "unreachable"
            assert list((await b.stub.ListModels(pb.ListModelsRequest())).models) == []
            await b.decode[0].start(int(b.decode[0].address.rpartition(":")[2]))
            await b.becomes(lambda: b.worker("decode-0").state == "ready")
            assert kinds(await b.answer())[-1] == "finished"

    run(main)


def test_a_restart_with_another_name_drops_the_old_gauge() -> None:
    async def main() -> None:
        async with bench() as b:
            await b.becomes(lambda: b.metric("worker_state", name="decode-0", state="ready") == 1)
            b.decode[0].info.epoch = "2"
            b.decode[0].info.name = "decode-renamed"
            await b.becomes(lambda: b.metric("worker_state", name="decode-renamed", state="ready") == 1)
            assert b.metric("worker_state", name="decode-0", state="ready") is None

    run(main)


def test_an_address_may_change_its_role() -> None:
    async def main() -> None:
        async with bench(decode=[FakeDecode("decode-0"), FakeDecode("decode-1")]) as b:
            port = int(b.decode[1].address.rpartition(":")[2])
            await b.decode[1].stop()
            newcomer = FakePrefill("prefill-late")
            await newcomer.start(port)
            await b.becomes(lambda: any(w.info.name == "prefill-late" for w in b.router.table.workers()))
            [group] = b.router.table.groups("toy")
            assert {worker.info.name for worker in group.prefill} == {"prefill-0", "prefill-late"}
            assert [worker.info.name for worker in group.decode] == ["decode-0"]
            await newcomer.stop()
            await b.decode[1].start(port)

    run(main)


class ChangingRegistry:
    """A registry whose list is set by the test."""

    def __init__(self, *addresses: str) -> None:
        self.listed: Sequence[str] = addresses

    async def addresses(self) -> Sequence[str]:
        return self.listed


@contextlib.asynccontextmanager
async def table_of(registry: ChangingRegistry, **settings: Any):
    background = Background()
    table = WorkerTable(
        registry,
        connect=lambda address: WorkerClient(address, poll_timeout_s=5, control_timeout_s=5),
        background=background,
        poll_interval_s=0.02,
        **settings,
    )
    polling = asyncio.create_task(table.run())
    try:
        yield table
    finally:
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)
        await background.settle(5)
        await table.close()


async def until(table: WorkerTable, met) -> None:
    while True:
        change = table.next_change()
        if met():
            return
        await asyncio.wait_for(change.wait(), 10)


def test_an_address_that_leaves_the_registry_is_forgotten_once_it_is_silent() -> None:
    async def main() -> None:
        one, other = FakePrefill("one"), FakePrefill("other")
        await one.start()
        await other.start()
        registry = ChangingRegistry(one.address, other.address)
        async with table_of(registry) as table:
            await until(table, lambda: len(list(table.workers())) == 2)
            registry.listed = [other.address]
            seen = len(one.polls)
            # it still answers, so a registry that lost its memory does no harm
            await one.polls.reaches(seen + 3)
            assert {worker.info.name for worker in table.workers()} == {"one", "other"}
            await one.stop()
            await until(table, lambda: {worker.info.name for worker in table.workers()} == {"other"})
        await other.stop()

    run(main)


def test_something_else_at_an_address_is_no_worker() -> None:
    async def main() -> None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        registry = ChangingRegistry(f"127.0.0.1:{port}")
        async with table_of(registry) as table:
            for _ in range(3):
                await asyncio.wait_for(table.next_change().wait(), 10)
            assert table.unseen() == [f"127.0.0.1:{port}"]
        await server.stop(0)

    run(main)


def test_integrity_notices_load_that_nobody_carries_any_more() -> None:
    async def main() -> None:
        async with bench() as b:
            charge = b.worker("decode-0").charge(1)
            with pytest.raises(AssertionError, match="decode-0"):
                b.router.check_integrity()
            charge.end()

    run(main)


def test_a_worker_that_answers_polls_and_fails_prompts_is_left_alone_and_shown() -> None:
    async def main() -> None:
        prefill = [FakePrefill("prefill-0"), FakePrefill("prefill-1")]
        prefill[0].script = lambda _: [InternalError("the GPU has fallen off")]
        async with bench(prefill, placement="round_robin") as b:
            for _ in range(12):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await b.answer()
            assert len(prefill[0].requests) == 5
            assert len(prefill[1].requests) == 7
            await b.becomes(lambda: b.metric("circuit_state", name="prefill-0", state="open") == 1)
            assert b.metric("circuit_state", name="prefill-0", state="closed") == 0
            assert b.metric("circuit_state", name="prefill-1", state="closed") == 1
            # its own word stays what it is: there is somebody
            assert b.worker("prefill-0").state == "ready"

    run(main)


def test_circuits_close_no_service_for_which_nobody_stands_in() -> None:
    async def main() -> None:
        async with bench() as b:
            sound = b.prefill[0].script
            b.prefill[0].script = lambda _: [InternalError("broken")]
            for _ in range(7):
                with pytest.raises(grpc.aio.AioRpcError):
                    await b.answer()
            assert len(b.prefill[0].requests) == 7
            await b.becomes(lambda: b.metric("circuit_state", name="prefill-0", state="open") == 1)
            await health_becomes(b, SERVING)
            b.prefill[0].script = sound
            assert await b.answer(model="toy")

    run(main)


def test_of_two_workers_that_both_fail_requests_go_to_either() -> None:
    async def main() -> None:
        prefill = [FakePrefill("prefill-0"), FakePrefill("prefill-1")]
        for each in prefill:
            each.script = lambda _: [InternalError("broken")]
        async with bench(prefill, placement="round_robin") as b:
            for _ in range(14):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await b.answer()
                assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert sum(len(each.requests) for each in prefill) == 14

    run(main)


def test_a_worker_that_comes_late_is_new_and_one_that_was_there_first_is_not() -> None:
    async def main() -> None:
        first, late = FakePrefill("first"), FakePrefill("late")
        await first.start()
        registry = ChangingRegistry(first.address)
        clock = Clock()
        async with table_of(registry, slow_start_s=10.0, clock=clock) as table:
            await until(table, lambda: len(list(table.workers())) == 1)
            [known] = table.workers()
            assert known.share == 1.0
            clock.now_s += 10
            await late.start()
            registry.listed = [first.address, late.address]
            await until(table, lambda: len(list(table.workers())) == 2)
            assert known.share == 1.0
            assert sorted(worker.share for worker in table.workers()) == [0.1, 1.0]
            clock.now_s += 5
            assert sorted(worker.share for worker in table.workers()) == [0.5, 1.0]
        await first.stop()
        await late.stop()

    run(main)


def test_groups_are_listed_anew_only_when_somebody_comes_or_goes() -> None:
    async def main() -> None:
        async with bench() as b:
            before = b.router.table.groups("toy")
            await b.decode[0].polls.reaches(len(b.decode[0].polls) + 3)
            assert b.router.table.groups("toy") is before
            b.decode[0].info.state = "draining"
            await b.becomes(lambda: not b.router.table.groups("toy"))
            b.decode[0].info.state = "ready"
            await b.becomes(lambda: len(b.router.table.groups("toy")) == 1)

    run(main)
