"""Memory that a thread uses is not given away before the thread has let go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.threads import run_to_end
from tests.unit.shared.scripted import run


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


class Work:
    """Runs until it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun, self.released, self.ended = threading.Event(), threading.Event(), False
        self._error = error

    def __call__(self) -> str:
        self.begun.set()
        assert self.released.wait(20)
        self.ended = True
        if self._error:
            raise self._error
        return "result"


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def begun(work: Work) -> None:
    assert await asyncio.get_running_loop().run_in_executor(None, work.begun.wait, 20)


def test_the_result_comes_back(executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        work = Work()
        work.released.set()
        assert await run_to_end(executor, work) == "result"

    run(main)


def test_an_exception_comes_back(executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        work = Work(KeyError("mine"))
        work.released.set()
        with pytest.raises(KeyError, match="mine"):
            await run_to_end(executor, work)

    run(main)


@pytest.mark.parametrize("cancellations", [1, 2, 5])
@pytest.mark.parametrize("error", [None, ValueError("nobody hears this")])
def test_however_often_it_is_cancelled_it_waits_for_the_thread(
    executor: ThreadPoolExecutor, cancellations: int, error: Exception | None
) -> None:
    async def main() -> None:
        work, told = Work(error), []
        task = asyncio.create_task(run_to_end(executor, work, on_cancel=lambda: told.append(work.ended)))
        await begun(work)
        for _ in range(cancellations):
            task.cancel()
            await turns()
            assert not task.done()
        assert told == [False], "on_cancel is called once, at once"
        work.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.ended

    run(main)


def test_on_cancel_can_end_the_work(executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        work = Work()
        task = asyncio.create_task(run_to_end(executor, work, on_cancel=work.released.set))
        await begun(work)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.ended

    run(main)


def test_on_cancel_is_not_called_without_a_cancellation(executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        told: list[int] = []
        await run_to_end(executor, lambda: None, on_cancel=lambda: told.append(1))
        assert told == []

    run(main)


def test_work_that_waits_for_a_thread_is_waited_for_too(executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        first, second = Work(), Work()
        blocking = asyncio.create_task(run_to_end(executor, first))
        task = asyncio.create_task(run_to_end(executor, second))
        await begun(first)
        task.cancel()
        await turns()
        assert not task.done()
        first.released.set()
        second.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert second.ended
        assert await blocking == "result"

    run(main)


def test_a_timeout_around_it_ends_after_the_thread(executor: ThreadPoolExecutor) -> None:
    async def main() -> None:
        work = Work()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(run_to_end(executor, work, on_cancel=work.released.set), timeout=0.01)
        assert work.ended

    run(main)
