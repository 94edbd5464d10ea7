"""The life of a prefill with scripted pieces: whatever ends it, its memory comes back and its thread lets go."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as public

from prefill_worker.compression.policy import PromptShape
from prefill_worker.compression.vl_cache import VLCache
from prefill_worker.job import Compressed, Event, FirstToken, PrefillJob, Transferred
from prefill_worker.kv_sender import Ticket
from prefill_worker.parcel_store import ParcelStore
from prefill_worker.prompt import Prompt
from prefill_worker.runner import PrefillRunner
from prefill_worker.scheduler import PrefillScheduler
from shared.errors import (
    AbortedError,
    DuplicateRequestError,
    InvalidRequestError,
    RequestCancelledError,
    ResourceExhaustedError,
    TooLargeError,
    UnavailableError,
)
from shared.kv.arena import Arena
from shared.kv.manifest import TransferId
from shared.kv.transport.base import Parcel, SendReport
from shared.request.params import Budget, Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.prefill_worker.manifests import LAYOUT, manifest
from tests.unit.prefill_worker.prompts import raw_prompt

TOKENS = 40
BOUND = LAYOUT.full_bytes(Budget(retention=0.5).kept_tokens_bound(TOKENS))
FIRST = FirstToken(
    token=5, text="a", finish_reason=public.FINISH_REASON_UNSPECIFIED, prompt_tokens=TOKENS, visual_tokens=0
)


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 - threads change it, too
        await asyncio.sleep(0.005)


class Stage:
    """Passes at once, waits for `open`, or raises; usable from a thread and from the event loop."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()
        self.error: Exception | None = None

    def block(self) -> None:
        self.open.clear()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error


class Pieces:
    """Everything around the runner, with a stage to stop at in each."""

    def __init__(self, arena_bytes: int = 4 * BOUND, max_waiting: int = 4) -> None:
        self.building, self.computing, self.sending = Stage(), Stage(), Stage()
        self.first, self.ships = FIRST, True
        self.lost: asyncio.Event = asyncio.Event()
        self.sent: list[bytes] = []
        self.kept_alive = 0
        self.arena = Arena(arena_bytes)
        self.store = ParcelStore(self.arena)
        self.scheduler = PrefillScheduler(max_waiting=max_waiting)
        self.runner = PrefillRunner(
            builder=self,  # type: ignore[arg-type]
            compute=self,  # type: ignore[arg-type]
            scheduler=self.scheduler,
            store=self.store,
            sender=self,  # type: ignore[arg-type]
            layout=LAYOUT,
            metrics=PrefillMetrics(worker="p", model="m"),
            preprocess_threads=2,
        )

    def build(self, messages: Any, *, max_new_tokens: int) -> Prompt:
        self.building.pass_through()
        return raw_prompt([1] * TOKENS, PromptShape(num_tokens=TOKENS, num_visual=0, last_visual=None))

    def run(self, job: PrefillJob, prompt: Prompt, body: memoryview, emit: Callable[[Event], None]) -> Any:
        emit(self.first)
        self.computing.pass_through()
        if job.cancelled.is_set():
            raise RequestCancelledError("cancelled before layer 3")
        if not self.ships:
            return None
        made = manifest()
        body[: made.body_bytes] = b"k" * made.body_bytes
        emit(Compressed(message=public.Compression(kept_bytes=made.body_bytes)))
        return made

    @contextlib.asynccontextmanager
    async def keep_alive(self, ticket: Ticket) -> AsyncIterator[None]:
        self.kept_alive += 1
        try:
            yield
        finally:
            self.kept_alive -= 1

    async def send(self, parcel: Parcel, ticket: Ticket) -> SendReport:
        self.sending.reached.set()
        await until(self.sending.open.is_set)
        self.sending.pass_through()
        self.sent.append(bytes(parcel.body))
        return SendReport(transport="grpc", sent_bytes=len(parcel.body), seconds=0.1)


def job(request_id: str = "r", attempt: int = 1) -> PrefillJob:
    return PrefillJob(
        transfer=TransferId(request_id=request_id, attempt=attempt, prefill_epoch="e"),
        messages=(),
        sampling=Sampling(max_new_tokens=8),
        budget=Budget(retention=0.5),
        policy=VLCache(),
        ticket=Ticket(decode_worker="d", address="x:1", token=b"t", transport="grpc", reserved_bytes=1),
    )


async def collect(pieces: Pieces, what: PrefillJob) -> list[Event]:
    return [event async for event in pieces.runner.stream(what)]


async def reached(stage: Stage) -> None:
    await asyncio.get_running_loop().run_in_executor(None, stage.reached.wait, 10)


async def idle(pieces: Pieces) -> None:
    await until(lambda: not pieces.runner._jobs)


def run(body: Callable[[Pieces], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        pieces = Pieces(**options)
        try:
            await asyncio.wait_for(body(pieces), 20)
            await asyncio.wait_for(idle(pieces), 20)
            pieces.runner.check_integrity()
            assert pieces.store.used_bytes == pieces.scheduler.outstanding_tokens == pieces.kept_alive == 0
        finally:
            for stage in (pieces.building, pieces.computing, pieces.sending):
                stage.open.set()
            pieces.runner.close()
            pieces.arena.close()

    asyncio.run(main())


def test_events_come_in_order_and_memory_goes_back() -> None:
    async def body(pieces: Pieces) -> None:
        events = await collect(pieces, job())
        assert [type(event) for event in events] == [FirstToken, Compressed, Transferred]
        assert events[0] == FIRST
        assert events[2] == Transferred(transport="grpc", sent_bytes=manifest().body_bytes, seconds=0.1)
        assert pieces.sent == [b"k" * manifest().body_bytes]

    run(body)


def test_the_first_token_leaves_while_the_rest_is_computed() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        stream = pieces.runner.stream(job())
        assert await anext(stream) == FIRST
        assert pieces.store.used_bytes == BOUND
        pieces.computing.open.set()
        assert len([event async for event in stream]) == 2

    run(body)


def test_an_answer_that_ends_with_its_first_token_ships_nothing() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.ships = False
        assert await collect(pieces, job()) == [FIRST]
        assert pieces.sent == []

    run(body)


@pytest.mark.parametrize("stage", ["building", "computing", "sending"])
@pytest.mark.parametrize("error", [InvalidRequestError("bad"), RuntimeError("bug"), UnavailableError("gone")])
def test_an_error_at_any_stage_reaches_the_caller(stage: str, error: Exception) -> None:
    async def body(pieces: Pieces) -> None:
        getattr(pieces, stage).error = error
        with pytest.raises(type(error), match=str(error)):
            await collect(pieces, job())
        await idle(pieces)
        assert pieces.store.used_bytes == 0
        getattr(pieces, stage).error = None
        assert len(await collect(pieces, job())) == 3

    run(body)


@pytest.mark.parametrize("stage", ["building", "computing", "sending"])
def test_leaving_at_any_stage_gives_everything_back(stage: str) -> None:
    async def body(pieces: Pieces) -> None:
        where: Stage = getattr(pieces, stage)
        where.block()
        mine = job()
        task = asyncio.create_task(collect(pieces, mine))
        await reached(where)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert mine.cancelled.is_set()
        await asyncio.sleep(0.02)
        if stage == "computing":
            assert pieces.store.used_bytes == BOUND, "the thread still writes there"
            with pytest.raises(DuplicateRequestError):
                await collect(pieces, job())
        where.open.set()
        await idle(pieces)
        assert pieces.sent == []

    run(body)


def test_leaving_between_two_events_cancels_the_work() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        mine = job()
        stream = pieces.runner.stream(mine)
        await anext(stream)
        await stream.aclose()
        assert mine.cancelled.is_set()
        pieces.computing.open.set()
        await idle(pieces)
        assert pieces.sent == []

    run(body)


def test_leaving_while_waiting_for_room_disturbs_nobody() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.sending.block()
        first = asyncio.create_task(collect(pieces, job("first")))
        await reached(pieces.sending)
        waiting, behind = (asyncio.create_task(collect(pieces, job(name))) for name in ("waiting", "behind"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        pieces.sending.open.set()
        assert [len(await task) for task in (first, behind)] == [3, 3]

    run(body, arena_bytes=BOUND)


def test_a_prompt_that_no_arena_could_hold_is_refused() -> None:
    async def body(pieces: Pieces) -> None:
        with pytest.raises(TooLargeError, match="retention"):
            await collect(pieces, job())

    run(body, arena_bytes=BOUND // 2)


def test_a_full_queue_refuses_and_holds_nothing() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        tasks = [asyncio.create_task(collect(pieces, job(name))) for name in "ab"]
        await until(lambda: pieces.scheduler.waiting == 1)
        with pytest.raises(ResourceExhaustedError, match="queue is full"):
            await collect(pieces, job("c"))
        assert pieces.store.used_bytes == 2 * BOUND
        pieces.computing.open.set()
        await asyncio.gather(*tasks)

    run(body, max_waiting=1)


def test_the_same_attempt_is_refused_while_it_runs_and_another_is_not() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        first = asyncio.create_task(collect(pieces, job()))
        await reached(pieces.computing)
        with pytest.raises(DuplicateRequestError, match="'r' is already being prefilled"):
            await collect(pieces, job())
        second = asyncio.create_task(collect(pieces, job(attempt=2)))
        pieces.computing.open.set()
        assert [len(await task) for task in (first, second)] == [3, 3]
        assert len(await collect(pieces, job())) == 3

    run(body)


def test_a_drain_lets_work_finish_in_time() -> None:
    async def body(pieces: Pieces) -> None:
        await pieces.runner.drain(0.01)
        pieces.sending.block()
        task = asyncio.create_task(collect(pieces, job()))
        await reached(pieces.sending)
        asyncio.get_running_loop().call_later(0.05, pieces.sending.open.set)
        await pieces.runner.drain(10)
        assert len(await task) == 3

    run(body)


def test_a_drain_ends_what_is_late() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.sending.block()
        task = asyncio.create_task(collect(pieces, job()))
        await reached(pieces.sending)
        await pieces.runner.drain(0.02)
        with pytest.raises((asyncio.CancelledError, AbortedError, UnavailableError)):
            await task

    run(body)
