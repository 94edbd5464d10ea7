"""What a runner retains, for how long, and sends again, with scripted pieces around it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from prefill_worker.job import Event, PrefillJob, Retained, Transferred
from shared.errors import DataLossError, InvalidRequestError, NotFoundError, ServiceError, UnavailableError
from tests.unit.prefill_worker.manifests import manifest
from tests.unit.prefill_worker.pieces import BOUND, Pieces, Stage, collect, idle, job, reached, run, ticket, until

BODY = manifest().body_bytes


async def retained(pieces: Pieces, request_id: str = "r") -> bytes:
    work = job(request_id)
    assert any(isinstance(event, Retained) for event in await collect(pieces, work))
    return work.parcel


async def until_retained(pieces: Pieces, what: PrefillJob) -> tuple[Any, bytes]:
    """A job up to its transfer, which is held: its stream, and the secret of its parcel."""
    pieces.sending.block()
    stream, events = pieces.runner.stream(what), list[Event]()
    while not (events and isinstance(events[-1], Retained)):
        events.append(await anext(stream))
    await reached(pieces.sending)
    return stream, what.parcel


def test_a_parcel_stays_when_its_prefill_is_over() -> None:
    async def body(pieces: Pieces) -> None:
        secret = await retained(pieces)
        await idle(pieces)
        assert (pieces.retained.used_bytes, pieces.retained.filling_bytes) == (BODY, 0)
        pieces.runner.check_integrity()
        pieces.retained.release(secret)
        assert pieces.store.used_bytes == 0

    run(body)


def test_it_is_announced_before_it_is_sent_with_its_lease() -> None:
    async def body(pieces: Pieces) -> None:
        stream, secret = await until_retained(pieces, job())
        assert pieces.sent == []
        pieces.sending.open.set()
        events = [event async for event in stream]
        assert [type(event) for event in events] == [Transferred]
        assert pieces.retained.renew(secret, 0.0)

    run(body)


def test_the_lease_of_the_configuration_is_told() -> None:
    async def body(pieces: Pieces) -> None:
        (told,) = (event for event in await collect(pieces, job()) if isinstance(event, Retained))
        assert told.lease_s == 7.0

    run(body, lease_s=7.0)


@pytest.mark.parametrize("error", [UnavailableError("gone"), NotFoundError("ended"), DataLossError("broken")])
def test_it_stays_when_its_transfer_fails_and_the_error_says_where(error: ServiceError) -> None:
    async def body(pieces: Pieces) -> None:
        pieces.sending.error = error
        work = job()
        with pytest.raises(type(error)) as caught:
            await collect(pieces, work)
        assert (caught.value.stage, caught.value.worker) == ("transfer", "d")
        pieces.sending.error = None
        await pieces.runner.resend(work.parcel, 2, ticket("e"))
        assert pieces.sent == [b"k" * BODY]

    run(body)


@pytest.mark.parametrize(
    ("stage", "said"), [("building", "preprocess"), ("computing", "prefill"), ("arriving", "select")]
)
def test_errors_before_name_their_stage_and_leave_the_worker_to_the_server(stage: str, said: str) -> None:
    async def body(pieces: Pieces) -> None:
        where: Stage = getattr(pieces, stage)
        where.error = InvalidRequestError("bad")
        with pytest.raises(InvalidRequestError) as caught:
            await collect(pieces, job())
        assert (caught.value.stage, caught.value.worker) == (said, "")
        await idle(pieces)
        assert pieces.store.used_bytes == 0

    run(body)


def test_the_same_bytes_go_out_again_under_another_attempt() -> None:
    async def body(pieces: Pieces) -> None:
        secret = await retained(pieces)
        for attempt in (2, 5):
            report = await pieces.runner.resend(secret, attempt, ticket("e"))
            assert report == Transferred(transport="grpc", sent_bytes=BODY, seconds=0.1)
        assert pieces.sent == 3 * [b"k" * BODY]
        assert pieces.sent_as == [replace(manifest().transfer, attempt=attempt) for attempt in (1, 2, 5)]
        counted = pieces.metrics.labelled(pieces.metrics.resends, reason="failover")
        assert counted._value.get() == 2

    run(body)


def test_it_can_go_to_several_at_the_same_time() -> None:
    async def body(pieces: Pieces) -> None:
        stream, secret = await until_retained(pieces, job())
        again = [asyncio.create_task(pieces.runner.resend(secret, n, ticket())) for n in range(2, 5)]
        await asyncio.sleep(0.01)
        assert pieces.kept_alive == 4
        pieces.sending.open.set()
        await asyncio.gather(*again)
        assert [type(event) async for event in stream] == [Transferred]
        assert pieces.sent == 4 * [b"k" * BODY]
        assert sorted(transfer.attempt for transfer in pieces.sent_as) == [1, 2, 3, 4]

    run(body)


def test_an_unknown_parcel_is_not_found_and_nothing_is_counted() -> None:
    async def body(pieces: Pieces) -> None:
        with pytest.raises(NotFoundError) as caught:
            await pieces.runner.resend(b"never", 2, ticket())
        assert (caught.value.reason, caught.value.stage, caught.value.worker) == ("NO_PARCEL", "transfer", "")
        assert pieces.metrics.labelled(pieces.metrics.resends, reason="failover")._value.get() == 0

    run(body)


def test_a_cancelled_resend_leaves_the_parcel_and_nothing_else() -> None:
    async def body(pieces: Pieces) -> None:
        secret = await retained(pieces)
        pieces.sending.block()
        pieces.sending.reached.clear()
        resend = asyncio.create_task(pieces.runner.resend(secret, 2, ticket()))
        await reached(pieces.sending)
        resend.cancel()
        with pytest.raises(asyncio.CancelledError):
            await resend
        await until(lambda: not pieces.runner._resends)
        assert pieces.kept_alive == 0
        assert pieces.retained.used_bytes == BODY
        pieces.retained.release(secret)
        assert pieces.store.used_bytes == 0

    run(body)


def test_a_call_that_is_left_during_its_transfer_takes_its_parcel_along() -> None:
    async def body(pieces: Pieces) -> None:
        stream, secret = await until_retained(pieces, job())
        await stream.aclose()
        await idle(pieces)
        assert pieces.store.used_bytes == 0
        assert not pieces.retained.renew(secret, 0.0)

    run(body)


def test_a_resend_outlives_the_call_whose_parcel_it_sends() -> None:
    async def body(pieces: Pieces) -> None:
        stream, secret = await until_retained(pieces, job())
        resend = asyncio.create_task(pieces.runner.resend(secret, 2, ticket()))
        await asyncio.sleep(0.01)
        await stream.aclose()
        await idle(pieces)
        assert pieces.retained.used_bytes == BODY, "it is being sent"
        pieces.sending.open.set()
        await resend
        assert pieces.sent == [b"k" * BODY]
        assert pieces.store.used_bytes == 0

    run(body)


def test_new_work_needs_not_wait_for_what_is_retained() -> None:
    async def body(pieces: Pieces) -> None:
        secrets = [await retained(pieces, str(n)) for n in range(3)]
        assert [pieces.retained.renew(secret, 0.0) for secret in secrets] == [False, False, True]

    run(body, arena_bytes=BOUND)


def test_nothing_is_announced_where_nothing_is_retained() -> None:
    async def body(pieces: Pieces) -> None:
        events = await collect(pieces, job())
        assert not any(isinstance(event, Retained) for event in events)
        assert isinstance(events[-1], Transferred)
        await idle(pieces)
        assert pieces.store.used_bytes == 0

    run(body, retained_bytes=0)


def test_a_lease_that_ends_is_counted() -> None:
    async def body(pieces: Pieces) -> None:
        await retained(pieces)
        pieces.runner.expire(0.0)
        assert pieces.retained.used_bytes == BODY
        pieces.runner.expire(float("inf"))
        assert pieces.store.used_bytes == 0
        assert pieces.metrics.labelled(pieces.metrics.lease_expired, side="prefill")._value.get() == 1

    run(body)


def test_a_drain_waits_for_resends_and_then_retains_nothing() -> None:
    async def body(pieces: Pieces) -> None:
        secret, other = await retained(pieces), await retained(pieces, "other")
        pieces.sending.block()
        pieces.sending.reached.clear()
        resend = asyncio.create_task(pieces.runner.resend(secret, 2, ticket()))
        await reached(pieces.sending)
        drain = asyncio.create_task(pieces.runner.drain(10))
        await asyncio.sleep(0.02)
        assert not drain.done()
        assert pieces.retained.renew(other, 0.0)
        pieces.sending.open.set()
        await drain
        assert isinstance(await resend, Transferred)
        assert pieces.store.used_bytes == 0

    run(body)


def test_a_drain_ends_a_resend_that_is_late() -> None:
    async def body(pieces: Pieces) -> None:
        secret = await retained(pieces)
        pieces.sending.block()
        pieces.sending.reached.clear()
        resend = asyncio.create_task(pieces.runner.resend(secret, 2, ticket()))
        await reached(pieces.sending)
        await pieces.runner.drain(0.02)
        assert pieces.store.used_bytes == 0
        with pytest.raises(UnavailableError, match="shutting down"):
            await resend

    run(body)
