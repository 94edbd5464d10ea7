"""The life of a prefill with scripted pieces: whatever ends it, its memory comes back and its thread lets go."""

import asyncio
from dataclasses import replace

import pytest

from prefill_worker.compression.policies.h2o import H2O
from prefill_worker.job import Compressed, FirstToken, Retained, Transferred
from shared.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    ResourceExhaustedError,
    TooLargeError,
    UnavailableError,
)
from shared.request.params import Budget
from tests.unit.prefill_worker.manifests import LAYOUT, manifest
from tests.unit.prefill_worker.pieces import (
    BOUND,
    FIRST,
    TOKENS,
    Pieces,
    Stage,
    collect,
    idle,
    job,
    reached,
    run,
    until,
)


def test_events_come_in_order_and_memory_goes_back() -> None:
    async def body(pieces: Pieces) -> None:
        events = await collect(pieces, job())
        assert [type(event) for event in events] == [FirstToken, Compressed, Retained, Transferred]
        assert events[0] == FIRST
        assert events[3] == Transferred(transport="grpc", sent_bytes=manifest().body_bytes, seconds=0.1)
        assert pieces.sent == [b"k" * manifest().body_bytes]
        assert pieces.retained.filling_bytes == 0

    run(body)


def test_a_policy_that_knows_no_windows_is_refused_before_any_work() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.runner._layout = replace(LAYOUT, windows=(8,) * LAYOUT.num_layers)
        with pytest.raises(InvalidRequestError) as caught:
            await collect(pieces, replace(job(), policy=H2O()))
        assert caught.value.reason == "POLICY_MODEL"
        assert not pieces.computing.reached.is_set()
        assert pieces.store.used_bytes == 0

    run(body)


def test_the_first_token_leaves_while_the_rest_is_computed() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        stream = pieces.runner.stream(job())
        assert await anext(stream) == FIRST
        assert pieces.store.used_bytes == BOUND
        pieces.computing.open.set()
        assert len([event async for event in stream]) == 3

    run(body)


def test_an_answer_that_ends_with_its_first_token_ships_nothing() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.ships = False
        assert await collect(pieces, job()) == [FIRST]
        assert pieces.sent == []

    run(body)


@pytest.mark.parametrize("stage", ["building", "computing", "arriving", "sending"])
@pytest.mark.parametrize("error", [InvalidRequestError("bad"), RuntimeError("bug"), UnavailableError("gone")])
def test_an_error_at_any_stage_reaches_the_caller(stage: str, error: Exception) -> None:
    async def body(pieces: Pieces) -> None:
        getattr(pieces, stage).error = error
        with pytest.raises(type(error), match=str(error)):
            await collect(pieces, job())
        await idle(pieces)
        assert pieces.retained.filling_bytes == 0
        getattr(pieces, stage).error = None
        assert len(await collect(pieces, job())) == 4

    run(body)


@pytest.mark.parametrize("stage", ["building", "computing", "arriving", "sending"])
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
        if stage in ("computing", "arriving"):
            assert pieces.store.used_bytes == BOUND, "the thread still writes there"
            with pytest.raises(DuplicateRequestError):
                await collect(pieces, job())
        where.open.set()
        await idle(pieces)
        assert pieces.sent == []
        assert pieces.store.used_bytes == 0

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
        assert [len(await task) for task in (first, behind)] == [4, 4]

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


def test_the_wait_for_other_prompts_is_measured() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        tasks = [asyncio.create_task(collect(pieces, job(name))) for name in "ab"]
        await until(lambda: pieces.scheduler.waiting == 1)
        read, labels = pieces.metrics.registry.get_sample_value, {"role": "prefill", "worker": "p", "model": "m"}
        assert read("vlcache_request_queue_time_seconds_count", labels) == 1
        pieces.computing.open.set()
        await asyncio.gather(*tasks)
        assert read("vlcache_request_queue_time_seconds_count", labels) == 2

    run(body)


def test_room_is_an_orphan_where_no_call_fills_it() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        task = asyncio.create_task(collect(pieces, job()))
        await until(lambda: pieces.store.used_bytes)
        assert (pieces.retained.filling_bytes, pieces.runner.orphan_bytes) == (BOUND, 0)
        pieces.computing.open.set()
        await task
        slot = await pieces.store.allocate(BOUND)
        assert pieces.runner.orphan_bytes == slot.extent.nbytes
        pieces.store.free(slot)
        assert pieces.runner.orphan_bytes == 0

    run(body)


def test_the_same_attempt_is_refused_while_it_runs_and_another_is_not() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        first = asyncio.create_task(collect(pieces, job()))
        await reached(pieces.computing)
        with pytest.raises(DuplicateRequestError, match="'r' is already being prefilled"):
            await collect(pieces, job())
        second = asyncio.create_task(collect(pieces, job(attempt=2)))
        pieces.computing.open.set()
        assert [len(await task) for task in (first, second)] == [4, 4]
        assert len(await collect(pieces, job())) == 4

    run(body)


def test_a_drain_lets_work_finish_in_time() -> None:
    async def body(pieces: Pieces) -> None:
        await pieces.runner.drain(0.01)
        pieces.sending.block()
        task = asyncio.create_task(collect(pieces, job()))
        await reached(pieces.sending)
        asyncio.get_running_loop().call_later(0.05, pieces.sending.open.set)
        await pieces.runner.drain(10)
        assert len(await task) == 4

    run(body)


def test_a_drain_ends_what_is_late() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.sending.block()
        task = asyncio.create_task(collect(pieces, job()))
        await reached(pieces.sending)
        await pieces.runner.drain(0.02)
        with pytest.raises(UnavailableError, match="shutting down"):
            await task

    run(body)


FULL = LAYOUT.full_bytes(TOKENS)


def test_room_grows_at_both_ends_before_anything_is_written() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.wants = Budget(retention=1.0)
        pieces.arriving.block()
        task = asyncio.create_task(collect(pieces, job()))
        await reached(pieces.arriving)
        assert pieces.asked == [TOKENS]
        assert pieces.store.used_bytes == FULL, "the smaller slot went back"
        pieces.arriving.open.set()
        assert len(await task) == 4
        assert pieces.got is not None
        assert len(pieces.got) == FULL
        assert pieces.sent == [b"k" * manifest().body_bytes]

    run(body)


def test_a_refusal_of_the_decode_worker_leaves_the_smaller_room() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.wants, pieces.grants = Budget(retention=1.0), False
        pieces.arriving.block()
        task = asyncio.create_task(collect(pieces, job()))
        await reached(pieces.arriving)
        assert (pieces.asked, pieces.got, pieces.store.used_bytes) == ([TOKENS], None, BOUND)
        pieces.arriving.open.set()
        assert len(await task) == 4

    run(body)


def test_a_full_arena_refuses_at_once() -> None:
    """Whoever waits for the model thread holds a slot: who has the thread must not wait for one."""

    async def body(pieces: Pieces) -> None:
        pieces.computing.block()
        pieces.wants = Budget(retention=1.0)
        tasks = [asyncio.create_task(collect(pieces, job(name))) for name in ("a", "b")]
        await until(lambda: pieces.store.used_bytes == 2 * BOUND)
        pieces.computing.open.set()
        assert [len(await task) for task in tasks] == [4, 4]
        assert (pieces.asked, pieces.got) == ([], None)

    run(body, arena_bytes=2 * BOUND)


def test_nobody_overtakes_who_waits_for_the_arena() -> None:
    async def body(pieces: Pieces) -> None:
        store = pieces.store
        held = await store.allocate(3 * BOUND)
        waiting = asyncio.create_task(store.allocate(2 * BOUND))
        await until(store._turn.locked)
        assert store.allocate_now(64) is None
        store.free(held)
        store.free(await waiting)
        slot = store.allocate_now(64)
        assert slot is not None
        store.free(slot)

    run(body)
