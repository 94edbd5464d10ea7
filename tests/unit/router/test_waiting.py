"""The queue in front of full decode workers: who is let in, who goes first, and what the others hear."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from vlcache.worker.v1 import decode_pb2

from router.admission.lanes import Rank
from router.admission.waiting import RoomLimits, WaitingRoom
from shared.errors import ResourceExhaustedError
from shared.rpc.status import from_rpc_error
from tests.unit.router.fakes import Bench, bench, go_on, run
from tests.unit.router.test_failures import error_of, full

MANY = 10_000


def room(requests: int = MANY, num_bytes: int = MANY) -> WaitingRoom:
    return WaitingRoom(RoomLimits(requests=requests, num_bytes=num_bytes))


def rank(tenant: str = "a", priority: int = 0, *, begun: bool = False) -> Rank:
    return Rank(tenant=tenant, priority=priority, begun=begun)


def refused(waiting: WaitingRoom, num_bytes: int, what: str) -> None:
    with pytest.raises(ResourceExhaustedError, match=what) as caught, waiting.place(rank(), num_bytes):
        pass
    error = caught.value
    assert (error.reason, error.stage, error.retryable) == ("QUEUE_FULL", "queue", True)
    assert error.retry_after_s is not None


def test_no_more_requests_and_bytes_wait_than_may() -> None:
    async def main() -> None:
        waiting = room(requests=2, num_bytes=100)
        with waiting.place(rank(), 60):
            refused(waiting, 41, "too many bytes")
            with waiting.place(rank("b"), 40):
                refused(waiting, 0, "too many requests")
            with waiting.place(rank("b"), 40):
                waiting.check_integrity()
        refused(waiting, 101, "too many bytes")
        waiting.check_integrity(idle=True)

    run(main)


def test_an_answer_that_has_begun_is_never_refused() -> None:
    async def main() -> None:
        waiting = room(requests=0, num_bytes=0)
        with waiting.place(rank(begun=True), 1 << 30):
            assert len(waiting) == 1
        waiting.check_integrity(idle=True)

    run(main)


def test_ten_thousand_wait_and_each_is_served_once() -> None:
    """One place in which all of them take turns; ten tenants, three priorities, every hundredth gives up."""

    async def main() -> None:
        waiting = room()
        free, all_gave_up = asyncio.Event(), asyncio.Event()
        served: list[tuple[int, str]] = []
        gave_up = []
        loop = asyncio.get_running_loop()

        async def request(number: int) -> None:
            who = rank(f"t{number % 10}", number % 3)
            with waiting.place(who, 1) as place:
                give_up_at_s = loop.time() + (0.01 if number % 100 == 99 else 60)
                while await place.turn(give_up_at_s):
                    if free.is_set():
                        place.served = True
                        served.append((who.priority, who.tenant))
                        return
            gave_up.append(number)
            if len(gave_up) == MANY // 100:
                all_gave_up.set()

        tasks = [asyncio.create_task(request(number)) for number in range(MANY)]
        await all_gave_up.wait()
        waiting.check_integrity()
        free.set()
        await asyncio.gather(*tasks)
        waiting.check_integrity(idle=True)
        assert len(served) == MANY - len(gave_up)
        # nobody has waited long enough for a step
        assert [priority for priority, _ in served] == sorted(priority for priority, _ in served)
        # in every round all who are still there have had a turn
        assert all(len({tenant for _, tenant in served[start : start + 10]}) == 10 for start in range(0, 3000, 10))

    run(main)


async def line_up(b: Bench, *asked: dict[str, Any]) -> list[asyncio.Task[Any]]:
    """Requests that wait, in the order of their arrival."""
    b.decode[0].admit = full
    tasks = []
    for fields in asked:
        tasks.append(asyncio.create_task(b.answer(**fields)))
        await b.becomes_waiting(len(tasks))
    return tasks


async def serve_all(b: Bench, tasks: list[asyncio.Task[Any]]) -> list[str]:
    """Makes room, and says in which order they got it."""
    b.decode[0].admit = lambda _: None
    await asyncio.gather(*tasks)
    return [request.request.request_id for request in b.prefill[0].requests]


def test_the_urgent_go_first_and_tenants_take_turns() -> None:
    async def main() -> None:
        async with bench() as b:
            tasks = await line_up(
                b,
                {"request_id": "a1", "tenant": "a"},
                {"request_id": "a2", "tenant": "a"},
                {"request_id": "a3", "tenant": "a"},
                {"request_id": "late", "tenant": "c", "priority": 1},
                {"request_id": "b1", "tenant": "b"},
                {"request_id": "b2", "tenant": "b"},
                {"request_id": "urgent", "tenant": "a", "priority": -1},
            )
            assert await serve_all(b, tasks) == ["urgent", "a1", "b1", "a2", "b2", "a3", "late"]

    run(main)


def test_whoever_is_more_urgent_than_all_who_wait_asks_at_once() -> None:
    async def main() -> None:
        async with bench() as b:

            def admit(request: decode_pb2.ReserveRequest) -> None:
                if request.request_id != "urgent":
                    full(request)

            (patient,) = await line_up(b, {"request_id": "patient"})
            b.decode[0].admit = admit
            await b.answer(request_id="urgent", priority=-1)
            assert b.metric("reservation_wait_seconds_count") == 0
            assert not patient.done()
            await serve_all(b, [patient])

    run(main)


def test_a_request_that_does_not_fit_the_queue_is_refused_at_once_and_told_when_to_come_back() -> None:
    async def main() -> None:
        async with bench(max_waiting_mib=1) as b:
            tasks = await line_up(b, {"text": "x" * 700_000})
            error = await error_of(b, text="x" * 700_000)
            assert (error.code, error.reason, error.stage) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", "queue")
            assert error.retry_after_s is not None
            assert 0.5 <= error.retry_after_s <= 30
            assert b.metric("tenant_requests_refused_total", tenant="default", reason="QUEUE_FULL") == 1
            small = asyncio.create_task(b.answer())
            await b.becomes_waiting(2)
            await serve_all(b, [*tasks, small])

    run(main)


def test_who_is_refused_is_told_how_fast_the_queue_moves() -> None:
    """Two that are refused together are not sent to the same place."""

    async def main() -> None:
        async with bench(max_waiting=1) as b:
            (task,) = await line_up(b, {})
            told = [(await error_of(b)).retry_after_s for _ in range(2)]
            await serve_all(b, [task])
            assert all(seconds is not None and 0.5 <= seconds <= 30 for seconds in told)
            assert told == sorted(told)

    run(main)


def test_both_ends_of_patience_are_told_as_the_queues() -> None:
    async def main() -> None:
        async with bench(queue_timeout_s=0.2) as b:
            b.decode[0].admit = full
            error = await error_of(b)
            assert (error.code, error.stage) == ("RESOURCE_EXHAUSTED", "queue")
            assert error.retry_after_s is not None
        async with bench() as b:
            b.decode[0].admit = full
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await b.ask(timeout=1.0).read()
            error = from_rpc_error(caught.value)
            assert (error.code, error.stage) == ("DEADLINE_EXCEEDED", "queue")

    run(main)


def test_the_queues_time_is_charged_to_no_worker() -> None:
    """It waits for longer than any stage may take."""

    async def main() -> None:
        async with bench(prefill_timeout_s=0.3, transfer_timeout_s=0.3, token_timeout_s=0.3) as b:
            b.decode[0].script = go_on()
            tasks = await line_up(b, {"request_id": "patient"})
            began_s = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() < began_s + 0.5:
                await b.decode[0].reserves.reaches(len(b.decode[0].reserves) + 1)
            assert await serve_all(b, tasks) == ["patient"]
            assert b.worker("prefill-0").state == b.worker("decode-0").state == "ready"

    run(main)
