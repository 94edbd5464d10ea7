"""The pool over scripted processes: who waits, who is refused, and what becomes of a process that fails."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prefill_worker.preprocess import pool as pool_module
from prefill_worker.preprocess.pool import PreprocessPool, PreprocessStartError
from prefill_worker.preprocess.positions import plain_positions
from prefill_worker.preprocess.processed import ProcessedPrompt
from prefill_worker.preprocess.wire import Frame, FrameError
from prefill_worker.prompt import Prompt
from shared.errors import ContextTooLongError, InvalidRequestError, ResourceExhaustedError, UnavailableError
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.prefill_worker.pieces import until
from tests.unit.prefill_worker.prompts import user

SPEC: Any = SimpleNamespace(vocabulary=100, visual_token_ids=(3,))
VISUAL = 3


def answer(tokens: list[int]) -> ProcessedPrompt:
    return ProcessedPrompt(
        inputs={"input_ids": np.array([tokens])},
        special=(),
        punctuation=(),
        seed=5,
        pixels=(),
        positions=plain_positions(len(tokens)),
    )


class Scripted:
    """A process that answers max_new_tokens as its only token; `stuck` at 13, and worse at what `Processes` says."""

    def __init__(self, owner: Processes) -> None:
        self.owner = owner
        self.alive, self.ended, self.asked = True, False, list[int]()
        self.peer, self._its_own = socket.socketpair()
        if owner.starts:
            self._its_own.send(b"ready")
        else:
            self._its_own.close()

    async def ready(self) -> None:
        await asyncio.sleep(0)
        if not self.owner.starts:
            raise EOFError

    async def ask(self, request: Frame) -> ProcessedPrompt:
        number = request.header["max_new_tokens"]
        self.asked.append(number)
        self.owner.busy += 1
        try:
            if number == 13:
                await asyncio.Event().wait()
            if number in self.owner.gates:
                await self.owner.gates[number].wait()
            if number in self.owner.errors:
                raise self.owner.errors[number]
            await asyncio.sleep(0)
            return answer([number, VISUAL])
        finally:
            self.owner.busy -= 1

    async def end(self) -> None:
        assert not self.ended
        self.ended, self.alive = True, False
        self.peer.close()
        self._its_own.close()


class Processes:
    """All processes that were started."""

    def __init__(self) -> None:
        self.started: list[Scripted] = []
        self.starts = True
        self.busy = 0
        self.gates: dict[int, asyncio.Event] = {}
        self.errors: dict[int, Exception] = {}

    def launch(self) -> Any:
        self.started.append(Scripted(self))
        return self.started[-1]

    @property
    def running(self) -> list[Scripted]:
        return [process for process in self.started if not process.ended]


class Setting:
    def __init__(self, **options: Any) -> None:
        self.processes = Processes()
        self.metrics = PrefillMetrics(worker="p", model="m")
        values = {"processes": 2, "timeout_s": 30.0, "max_waiting": 8, "max_waiting_bytes": 1 << 20, **options}
        self.pool = PreprocessPool(self.processes.launch, SPEC, self.metrics, **values)

    async def build(self, number: int, text: str = "hi") -> Prompt:
        return await self.pool.build([user(text)], max_new_tokens=number, tenant="t")

    def begin(self, number: int, text: str = "hi") -> asyncio.Task[Prompt]:
        return asyncio.create_task(self.build(number, text))

    def replaced(self, reason: str) -> float:
        return self.metrics.labelled(self.metrics.preprocess_replaced, reason=reason)._value.get()

    def gate(self, *numbers: int) -> None:
        for number in numbers:
            self.processes.gates[number] = asyncio.Event()

    def open(self, *numbers: int) -> None:
        for number in numbers:
            self.processes.gates[number].set()

    async def busy(self, count: int) -> None:
        while self.processes.busy != count:  # noqa: ASYNC110 - tasks change it
            await asyncio.sleep(0)


def run(body: Callable[[Setting], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        setting = Setting(**options)
        try:
            await asyncio.wait_for(body(setting), 20)
            setting.pool.check_integrity()
        finally:
            await setting.pool.close()
        assert not setting.processes.running
        assert not setting.pool._waiting
        setting.pool.check_integrity()

    asyncio.run(main())


def test_an_answer_becomes_a_prompt_of_its_tenant() -> None:
    async def body(setting: Setting) -> None:
        prompt = await setting.build(5)
        assert prompt.inputs["input_ids"].tolist() == [[5, VISUAL]]
        assert prompt.shape.visual.tolist() == [False, True]
        assert (prompt.next_position, prompt.shape.seed, prompt.tenant) == (2, 5, "t")

    run(body)


def test_each_process_has_one_request_at_a_time_first_come_first_served() -> None:
    async def body(setting: Setting) -> None:
        setting.gate(1, 2)
        tasks = [setting.begin(number) for number in (1, 2, 3, 4)]
        await setting.busy(2)
        assert [process.asked for process in setting.processes.started] == [[1], [2]]
        setting.open(2)
        await asyncio.gather(*tasks[1:])
        assert [process.asked for process in setting.processes.started] == [[1], [2, 3, 4]]
        setting.open(1)
        await tasks[0]

    run(body)


@pytest.mark.parametrize("error", [InvalidRequestError("bad"), ContextTooLongError("long")])
def test_a_refusal_costs_no_process(error: Exception) -> None:
    async def body(setting: Setting) -> None:
        setting.processes.errors[7] = error
        with pytest.raises(type(error)) as caught:
            await setting.build(7)
        assert caught.value is error
        await asyncio.gather(*(setting.build(number) for number in (1, 2, 3)))
        assert len(setting.processes.started) == 2

    run(body)


def test_a_slow_request_ends_with_its_process_and_disturbs_nobody() -> None:
    async def body(setting: Setting) -> None:
        slow = setting.begin(13)
        await setting.busy(1)
        others = [setting.begin(number) for number in (1, 2, 3)]
        await asyncio.gather(*others)
        with pytest.raises(InvalidRequestError, match=r"longer than 0\.05 s") as caught:
            await slow
        assert caught.value.reason == "PREPROCESS_TIMEOUT"
        await setting.build(4)
        await setting.busy(0)
        assert setting.replaced("timeout") == 1
        assert [process.ended for process in setting.processes.started] == [True, False, False]

    run(body, timeout_s=0.05)


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(), BrokenPipeError(), FrameError("?"), ValueError("?")]
)
def test_a_process_that_breaks_down_fails_its_request_alone_and_is_replaced(error: Exception) -> None:
    async def body(setting: Setting) -> None:
        setting.processes.errors[7] = error
        with pytest.raises(InvalidRequestError, match="broke down") as caught:
            await setting.build(7)
        assert (caught.value.reason, caught.value.retryable) == ("PREPROCESS_CRASH", False)
        assert (await setting.build(1)).next_position == 2
        assert setting.replaced("crash") == 1

    run(body, processes=1)


def test_an_answer_that_cannot_be_is_a_breakdown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(setting: Setting) -> None:
        with pytest.raises(InvalidRequestError, match="broke down"):
            await setting.build(SPEC.vocabulary)
        await setting.build(SPEC.vocabulary - 1)

    run(body, processes=1)


def test_one_that_ended_while_idle_costs_no_request() -> None:
    async def body(setting: Setting) -> None:
        await setting.build(1)
        for process in setting.processes.started:
            process.alive = False
        prompts = await asyncio.gather(*(setting.build(number) for number in (1, 2, 4)))
        assert [prompt.inputs["input_ids"][0, 0] for prompt in prompts] == [1, 2, 4]
        assert setting.replaced("ended") >= 1

    run(body)


def test_too_many_requests_are_refused_and_those_that_leave_make_room() -> None:
    async def body(setting: Setting) -> None:
        setting.gate(1)
        tasks = [setting.begin(1)]
        await setting.busy(1)
        tasks += [setting.begin(number) for number in (2, 4)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError, match="wait for preprocessing") as caught:
            await setting.build(5)
        assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 1.0)
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        setting.pool.check_integrity()
        tasks.append(setting.begin(6))
        await asyncio.sleep(0)
        setting.open(1)
        assert [(await task).next_position for task in (tasks[0], *tasks[2:])] == [2, 2, 2]
        assert setting.processes.started[0].asked == [1, 4, 6]

    run(body, processes=1, max_waiting=2)


def test_waiting_requests_share_so_many_bytes_and_a_large_one_waits_alone() -> None:
    async def body(setting: Setting) -> None:
        setting.gate(1)
        first = setting.begin(1)
        await setting.busy(1)
        large = setting.begin(2, "x" * 500)
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError):
            await setting.build(4)
        large.cancel()
        await asyncio.wait([large])
        small = [setting.begin(number, "x" * 30) for number in (5, 6)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError):
            await setting.build(7, "x" * 30)
        setting.open(1)
        await asyncio.gather(first, *small)

    run(body, processes=1, max_waiting_bytes=100)


def test_leaving_while_in_a_process_frees_the_caller_at_once_and_the_process_in_time() -> None:
    async def body(setting: Setting) -> None:
        setting.gate(1)
        leaving, stuck = setting.begin(1), setting.begin(13)
        await setting.busy(2)
        for task in (leaving, stuck):
            task.cancel()
        await asyncio.wait([leaving, stuck])
        assert leaving.cancelled()
        assert stuck.cancelled()
        setting.open(1)
        assert (await setting.build(2)).next_position == 2
        await until(lambda: setting.replaced("timeout"))
        await asyncio.gather(*(setting.build(number) for number in (3, 4, 5)))

    run(body, timeout_s=0.1)


def test_closing_tells_whoever_is_not_answered() -> None:
    async def main() -> None:
        setting = Setting(processes=1)
        setting.gate(1)
        tasks = [setting.begin(number) for number in (1, 2)]
        await setting.busy(1)
        await setting.pool.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, UnavailableError)
        assert not setting.processes.running

    asyncio.run(main())


def test_a_pool_whose_processes_do_not_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "RELAUNCH_S", 0.01)

    async def main() -> None:
        processes = Processes()
        processes.starts = False
        metrics = PrefillMetrics(worker="p", model="m")
        options: Any = {"processes": 2, "timeout_s": 1.0, "max_waiting": 8, "max_waiting_bytes": 1 << 20}
        pool = PreprocessPool(processes.launch, SPEC, metrics, **options)
        with pytest.raises(PreprocessStartError):
            pool.wait_ready()
        # one that served before and cannot start again is tried until it can
        task = asyncio.create_task(pool.build([user("hi")], max_new_tokens=1))
        await until(lambda: len(processes.started) >= 6)
        processes.starts = True
        assert (await asyncio.wait_for(task, 10)).next_position == 2
        await pool.close()

    asyncio.run(main())


def test_the_first_that_is_ready_suffices() -> None:
    async def body(setting: Setting) -> None:
        setting.pool.wait_ready()

    run(body)
