"""The queue before the model thread."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from prefill_worker.scheduler import PrefillScheduler
from shared.errors import InvalidRequestError, ResourceExhaustedError


def with_scheduler(max_waiting: int, body: Callable[[PrefillScheduler], Coroutine[Any, Any, None]]) -> None:
    scheduler = PrefillScheduler(max_waiting=max_waiting)
    asyncio.run(asyncio.wait_for(body(scheduler), 20))
    assert (scheduler.running, scheduler.waiting, scheduler.outstanding_tokens) == (0, 0, 0)
    scheduler.close()


class Gate:
    """Work that runs until it is let through."""

    def __init__(self, result: Any = None) -> None:
        self.started, self.open, self.cancelled = threading.Event(), threading.Event(), threading.Event()
        self.finished = False
        self._result = result

    def __call__(self) -> Any:
        self.started.set()
        assert self.open.wait(10)
        self.finished = True
        return self._result


async def started(gate: Gate) -> None:
    await asyncio.get_running_loop().run_in_executor(None, gate.started.wait, 10)


def submit(scheduler: PrefillScheduler, gate: Gate, tokens: int = 1) -> "asyncio.Task[Any]":
    return asyncio.create_task(scheduler.run(gate, num_tokens=tokens, cancelled=gate.cancelled))


def test_work_runs_one_at_a_time_in_order() -> None:
    async def body(scheduler: PrefillScheduler) -> None:
        active, order = [0], []

        def work(number: int) -> int:
            active[0] += 1
            assert active == [1]
            assert threading.current_thread().name.startswith("model")
            order.append(number)
            active[0] -= 1
            return number * number

        tasks = [scheduler.run(lambda n=n: work(n), num_tokens=n, cancelled=threading.Event()) for n in range(20)]
        assert await asyncio.gather(*tasks) == [n * n for n in range(20)]
        assert order == [*range(20)]
        assert scheduler.ended == 20

    with_scheduler(20, body)


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    async def body(scheduler: PrefillScheduler) -> None:
        gates = [Gate(number) for number in range(3)]
        tasks = [submit(scheduler, gate, tokens=100 + number) for number, gate in enumerate(gates)]
        await started(gates[0])
        assert (scheduler.running, scheduler.waiting, scheduler.outstanding_tokens) == (1, 2, 303)
        with pytest.raises(ResourceExhaustedError, match="queue is full") as caught:
            await scheduler.run(Gate(), num_tokens=7, cancelled=threading.Event())
        assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 1.0)
        assert scheduler.outstanding_tokens == 303
        for gate in gates:
            gate.open.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2]

    with_scheduler(2, body)


def test_a_cancelled_run_is_told_and_waits_until_the_thread_has_let_go() -> None:
    async def body(scheduler: PrefillScheduler) -> None:
        gate = Gate()
        task = submit(scheduler, gate, tokens=50)
        await started(gate)
        for _ in range(3):  # impatience must not break the promise
            task.cancel()
            await asyncio.sleep(0.01)
            assert gate.cancelled.is_set()
            assert not task.done()
            assert scheduler.outstanding_tokens == 50
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.finished

    with_scheduler(1, body)


def test_a_run_cancelled_in_the_queue_is_told_before_it_starts() -> None:
    async def body(scheduler: PrefillScheduler) -> None:
        first, second, third = Gate(1), Gate(2), Gate(3)
        tasks = [submit(scheduler, gate) for gate in (first, second, third)]
        await started(first)
        tasks[1].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert second.cancelled.is_set()
        assert not second.started.is_set()
        for gate in (first, second, third):
            gate.open.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert (results[0], results[2]) == (1, 3)
        assert isinstance(results[1], asyncio.CancelledError)
        assert not first.cancelled.is_set()

    with_scheduler(3, body)


def test_an_error_of_the_work_reaches_its_caller_and_no_one_else() -> None:
    async def body(scheduler: PrefillScheduler) -> None:
        def fail() -> None:
            raise InvalidRequestError("no")

        with pytest.raises(InvalidRequestError):
            await scheduler.run(fail, num_tokens=9, cancelled=threading.Event())
        assert await scheduler.run(lambda: 5, num_tokens=9, cancelled=threading.Event()) == 5

    with_scheduler(1, body)
