"""What a client sees when memory is short, a worker dies, or a peer breaks its word."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2

from shared import errors
from shared.rpc.status import from_rpc_error
from tests.unit.router.fakes import (
    Bench,
    FakeDecode,
    FakePrefill,
    bench,
    compression,
    first_to_log,
    first_token,
    forever,
    hang,
    kinds,
    run,
    say,
    text_of,
    transfer,
)


def full(_: decode_pb2.ReserveRequest) -> None:
    raise errors.ResourceExhaustedError("the pool is full", reason="KV_POOL_FULL")


async def error_of(b: Bench, **fields) -> errors.ServiceError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await b.answer(**fields)
    return from_rpc_error(caught.value)


def test_a_refusal_moves_on_to_the_next_decode_worker() -> None:
    async def main() -> None:
        decode = [FakeDecode("decode-0"), FakeDecode("decode-1")]
        decode[0].admit = full
        async with bench(decode=decode) as b:
            # whichever comes first by turn, only one of them can answer
            for _ in range(2):
                events = await b.answer()
                assert events[-1].finished.placement.decode_worker == "decode-1"
            assert len(decode[0].reserves) >= 1
            assert b.metric("reservation_rejected_total", reason="KV_POOL_FULL") == len(decode[0].reserves)
            # a refusal says nothing about the worker's health
            assert b.worker("decode-0").state == "ready"

    run(main)


def test_every_reservation_has_its_own_attempt_number() -> None:
    async def main() -> None:
        decode = [FakeDecode("decode-0"), FakeDecode("decode-1")]
        async with bench(decode=decode) as b:

            def refuse_twice(request: decode_pb2.ReserveRequest) -> None:
                if request.attempt <= 2:
                    full(request)

            for worker in decode:
                worker.admit = refuse_twice
            await b.answer()
            attempts = sorted(reserve.attempt for worker in decode for reserve in worker.reserves)
            assert attempts == [1, 2, 3]
            assert b.prefill[0].requests[0].attempt == 3

    run(main)


def test_waits_for_memory_and_goes_on_when_some_is_freed() -> None:
    async def main() -> None:
        async with bench() as b:
            ended = asyncio.Event()

            async def script(stream, handle, token) -> None:
                await ended.wait()
                await say("B")(stream, handle, token)

            def one_at_a_time(_: decode_pb2.ReserveRequest) -> None:
                if b.decode[0].live:
                    full(_)

            b.decode[0].script, b.decode[0].admit = script, one_at_a_time
            first = asyncio.create_task(b.answer(request_id="first"))
            await b.decode[0].attached.reaches(1)
            second = asyncio.create_task(b.answer(request_id="second"))
            await b.decode[0].reserves.reaches(2)
            assert not second.done()
            ended.set()
            for answer in await asyncio.gather(first, second):
                assert kinds(answer)[-1] == "finished"
            assert b.metric("num_requests_waiting") == 0
            assert b.metric("reservation_wait_seconds_count") == 1

    run(main)


def test_memory_that_stays_short_ends_in_resource_exhausted_with_a_hint() -> None:
    async def main() -> None:
        async with bench(queue_timeout_s=0.2) as b:
            b.decode[0].admit = full
            error = await error_of(b)
            assert isinstance(error, errors.ResourceExhaustedError)
            assert error.retry_after_s is not None
            # asked more than once, and the backoff kept it from hammering
            assert 2 <= len(b.decode[0].reserves) <= 10
            assert b.prefill[0].requests == []

    run(main)


def test_a_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        async with bench(max_waiting=1) as b:
            b.decode[0].admit = full
            waiting = b.ask()
            await b.decode[0].reserves.reaches(1)
            await b.decode[0].reserves.reaches(2)
            error = await error_of(b)
            assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
            waiting.cancel()

    run(main)


def test_those_who_wait_are_not_overtaken() -> None:
    async def main() -> None:
        async with bench() as b:
            b.decode[0].admit = full
            asked = []
            for name in ("one", "two", "three"):
                asked.append(asyncio.create_task(b.answer(request_id=name)))
                await b.becomes_waiting(len(asked))
            b.decode[0].admit = lambda _: None
            b.decode[0].reserves.clear()
            await asyncio.gather(*asked)
            served = [request.request.request_id for request in b.prefill[0].requests]
            assert served == ["one", "two", "three"]

    run(main)


def test_a_newcomer_that_would_fit_does_not_pass_those_who_wait() -> None:
    async def main() -> None:
        async with bench() as b:
            b.decode[0].admit = lambda request: full(request) if request.request_id == "big" else None
            big = asyncio.create_task(b.answer(request_id="big"))
            await b.becomes_waiting(1)
            small = asyncio.create_task(b.answer(request_id="small"))
            await b.becomes_waiting(2)
            await b.decode[0].reserves.reaches(len(b.decode[0].reserves) + 3)
            assert {reserve.request_id for reserve in b.decode[0].reserves} == {"big"}
            b.decode[0].admit = lambda _: None
            await asyncio.gather(big, small)
            assert [request.request.request_id for request in b.prefill[0].requests] == ["big", "small"]

    run(main)


def test_a_decode_worker_that_cannot_be_reached_is_left_out_until_it_answers() -> None:
    async def main() -> None:
        decode = [FakeDecode("decode-0"), FakeDecode("decode-1")]
        # polls are too rare to notice anything by themselves
        async with bench(decode=decode, poll_interval_s=60.0) as b:
            await decode[0].stop()
            for _ in range(3):
                events = await b.answer()
                assert events[-1].finished.placement.decode_worker == "decode-1"
            assert b.worker("decode-0").state == "unreachable"
            await decode[0].start(int(decode[0].address.rpartition(":")[2]))

    run(main)


def test_a_restarted_decode_worker_is_recognised_by_its_epoch() -> None:
    async def main() -> None:
        async with bench(poll_interval_s=60.0) as b:
            await b.answer()
            b.decode[0].info.epoch = "another life"
            old = b.worker("decode-0")
            error = await error_of(b)
            assert isinstance(error, errors.UnavailableError)
            # the refusal made the router look at once, long before the next poll
            await b.becomes(lambda: b.worker("decode-0").info.epoch == "another life")
            assert b.worker("decode-0") is not old
            assert kinds(await b.answer())[-1] == "finished"
            assert len(b.decode[0].streams) == 2

    run(main)


def test_a_restart_seen_by_the_poll_breaks_what_was_attached() -> None:
    async def main() -> None:
        async with bench(max_failovers=0) as b:
            b.decode[0].script = hang
            asked = asyncio.create_task(error_of(b))
            await b.decode[0].attached.reaches(1)
            b.decode[0].info.epoch = "another life"
            error = await asked
            assert (error.code, error.reason) == ("UNAVAILABLE", "DECODE_WORKER_LOST")
            assert (error.stage, error.worker) == ("decode", "decode-0")
            assert b.worker("decode-0").load == 0

    run(main)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_worker_of_a_role_fails_fast(role: str) -> None:
    async def main() -> None:
        workers = {"prefill": [FakePrefill()], "decode": [FakeDecode()]} | {role: []}
        async with bench(workers["prefill"], workers["decode"]) as b:
            error = await error_of(b, model="toy")
            assert (error.code, error.reason) == ("UNAVAILABLE", "NO_WORKER")
            assert role in error.message

    run(main)


def test_a_prefill_worker_lost_before_the_first_token_is_replaced() -> None:
    async def main() -> None:
        prefill = [FakePrefill("prefill-0"), FakePrefill("prefill-1")]

        def dies_once(request):
            if request.attempt == 1:
                return [errors.UnavailableError("going down")]
            return [first_token(), compression(), transfer()]

        for worker in prefill:
            worker.script = dies_once
        async with bench(prefill) as b:
            events = await b.answer()
            assert text_of(events) == "ABC"
            assert kinds(events).count("started") == 1
            first, second = (request for worker in prefill for request in worker.requests)
            assert {first.attempt, second.attempt} == {1, 2}
            assert first.request.sampling.seed == second.request.sampling.seed
            assert first.ticket.token != second.ticket.token
            await b.idle()
            # the first reservation was given back, the second one ended by itself
            assert b.decode[0].releases == [b"token-1"]

    run(main)


def test_a_prefill_worker_that_is_killed_before_the_first_token_is_replaced() -> None:
    async def main() -> None:
        prefill = [FakePrefill("prefill-0"), FakePrefill("prefill-1")]
        async with bench(prefill, poll_interval_s=60.0) as b:
            for worker in prefill:
                worker.script = lambda _: [forever()]
            asked = asyncio.create_task(b.answer())
            await first_to_log([worker.requests for worker in prefill])
            (victim,) = (worker for worker in prefill if worker.requests)
            other = next(worker for worker in prefill if worker is not victim)
            other.script = lambda _: [first_token(), compression(), transfer()]
            await victim.stop()
            assert (await asked)[-1].finished.placement.prefill_worker == other.info.name
            assert b.worker(victim.info.name).state == "unreachable"
            await victim.start(int(victim.address.rpartition(":")[2]))

    run(main)


def test_a_lost_prefill_worker_that_is_back_meanwhile_does_not_get_the_request_again() -> None:
    async def main() -> None:
        prefill = [FakePrefill("prefill-0"), FakePrefill("prefill-1")]
        async with bench(prefill) as b:
            for worker in prefill:
                worker.script = lambda _: [errors.UnavailableError("going down")]
            b.decode[0].admit = lambda request: full(request) if request.attempt > 1 else None
            asked = asyncio.create_task(b.answer())
            await first_to_log([worker.requests for worker in prefill])
            (lost,) = (worker for worker in prefill if worker.requests)
            for worker in prefill:
                worker.script = lambda _: [first_token(), compression(), transfer()]
            # the second try waits for memory until the lost worker looks fine again, and better than the other one
            await b.decode[0].reserves.reaches(3)
            other = next(worker for worker in prefill if worker is not lost)
            other.info.outstanding_tokens = 10_000
            await b.becomes(
                lambda: b.worker(lost.info.name).state == "ready" and b.worker(other.info.name).load > 9_000
            )
            b.decode[0].admit = lambda _: None
            assert (await asked)[-1].finished.placement.prefill_worker != lost.info.name

    run(main)


@pytest.mark.parametrize("max_failovers", [0, 1, 2])
def test_only_so_many_lost_workers_are_replaced(max_failovers: int) -> None:
    async def main() -> None:
        prefill = [FakePrefill(f"prefill-{number}") for number in range(4)]
        for worker in prefill:
            worker.script = lambda _: [errors.UnavailableError("going down", reason="DRAINING")]
        async with bench(prefill, max_failovers=max_failovers) as b:
            error = await error_of(b)
            assert (error.code, error.reason) == ("UNAVAILABLE", "DRAINING")
            assert error.stage == "prefill"
            assert sum(len(worker.requests) for worker in prefill) == max_failovers + 1
            assert {len(worker.requests) for worker in prefill} <= {0, 1}
            await b.idle()
            assert len(b.decode[0].releases) == max_failovers + 1

    run(main)


@pytest.mark.parametrize(
    "failure",
    [
        errors.ContextTooLongError("700 tokens do not fit"),
        errors.InvalidRequestError("not an image", reason="BAD_IMAGE"),
        errors.ResourceExhaustedError("too many prompts", retry_after_s=2.0),
        errors.InternalError("internal error"),
    ],
)
def test_other_failures_of_prefill_reach_the_client_as_they_are(failure: errors.ServiceError) -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: [failure]
            error = await error_of(b)
            assert type(error) is type(failure)
            assert (error.message, error.reason) == (failure.message, failure.reason)
            assert error.retry_after_s == failure.retry_after_s
            await b.idle()
            assert b.decode[0].releases == [b"token-1"]
            assert len(b.prefill[0].requests) == 1

    run(main)


def test_a_worker_that_cancels_does_not_make_the_client_cancelled() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: [errors.RequestCancelledError("no more")]
            assert (await error_of(b)).code == "ABORTED"

    run(main)


def test_prefill_that_fails_after_the_first_token_ends_the_request_on_decode_too() -> None:
    async def main() -> None:
        async with bench(max_failovers=0) as b:
            b.decode[0].script = hang
            b.prefill[0].script = lambda _: [first_token(), compression(), errors.DataLossError("digest mismatch")]
            error = await error_of(b)
            assert error.code == "DATA_LOSS"
            await b.idle()
            await b.decode[0].cancels.reaches(1)
            assert b.decode[0].releases == [b"token-1"]

    run(main)


def test_prefill_that_fails_after_the_answer_cannot_take_it_back() -> None:
    async def main() -> None:
        async with bench() as b:
            goes_on = asyncio.Event()
            gone = errors.UnavailableError("gone")
            b.prefill[0].script = lambda _: [first_token(), compression(), goes_on.wait(), gone]
            call = b.ask()
            seen = [await call.read() for _ in range(5)]
            assert text_of(seen) == "ABC"
            goes_on.set()
            assert (await call.read()).HasField("finished")

    run(main)


def test_prefill_that_ends_before_it_hands_over_is_a_bug_of_the_worker() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: [first_token()]
            error = await error_of(b)
            assert (error.code, error.reason) == ("INTERNAL", "NO_HAND_OVER")
            await b.idle()
            assert b.decode[0].releases == [b"token-1"]

    run(main)


def test_prefill_that_ends_without_a_token_is_a_bug_of_the_worker() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: []
            error = await error_of(b)
            assert (error.code, error.reason) == ("INTERNAL", "NO_FIRST_TOKEN")

    run(main)


def test_a_sequence_error_reaches_its_request_only() -> None:
    async def main() -> None:
        async with bench(max_failovers=0) as b:

            async def script(stream, handle, token) -> None:
                if handle == 1:
                    code = grpc.StatusCode.ABORTED.value[0]
                    error = decode_pb2.SequenceError(code=code, reason="LEASE_EXPIRED", message="the lease expired")
                    stream.send(decode_pb2.SequenceUpdate(handle=handle, error=error))
                else:
                    await say("B")(stream, handle, token)

            b.decode[0].script = script
            error = await error_of(b)
            assert (error.code, error.reason, error.message) == ("ABORTED", "LEASE_EXPIRED", "the lease expired")
            assert kinds(await b.answer())[-1] == "finished"
            assert len(b.decode[0].streams) == 1

    run(main)


@pytest.mark.parametrize("how", ["ends", "breaks"])
def test_a_broken_token_stream_ends_every_request_on_it_and_is_reopened(how: str) -> None:
    async def main() -> None:
        async with bench(max_failovers=0) as b:
            b.decode[0].script = hang
            asked = [asyncio.create_task(error_of(b)) for _ in range(3)]
            await b.decode[0].attached.reaches(3)
            if how == "ends":
                b.decode[0].streams[0].end()
            else:
                await b.decode[0].restart()
            for error in await asyncio.gather(*asked):
                assert (error.code, error.reason) == ("UNAVAILABLE", "DECODE_WORKER_LOST")
            b.decode[0].live.clear()
            b.decode[0].script = say("B")
            await b.becomes(lambda: b.worker("decode-0").info.epoch == b.decode[0].info.epoch)
            assert kinds(await b.answer())[-1] == "finished"

    run(main)


def test_a_duplicate_id_is_refused_and_leaves_the_first_alone() -> None:
    async def main() -> None:
        async with bench() as b:
            goes_on = asyncio.Event()
            b.prefill[0].script = lambda _: [goes_on.wait(), first_token("A", pb.FINISH_REASON_STOP)]
            first = asyncio.create_task(b.answer(request_id="twin"))
            await b.prefill[0].requests.reaches(1)
            assert (await error_of(b, request_id="twin")).code == "ALREADY_EXISTS"
            goes_on.set()
            assert kinds(await first)[-1] == "finished"

    run(main)
