"""Workers die at every point of an answer, and its client notices nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from shared import errors
from tests.unit.router.fakes import (
    ANSWER,
    KEPT_BYTES,
    SENT_BYTES,
    Bench,
    FakeDecode,
    FakePrefill,
    Stream,
    bench,
    compression,
    first_token,
    forever,
    go_on,
    hang,
    kinds,
    next_token,
    prompt_done,
    rest,
    retained,
    run,
    text_of,
    transfer,
)
from tests.unit.router.test_failures import error_of, full

TOKENS = list(range(1, len(ANSWER) + 1))


def pairs(prefill: int = 2, decode: int = 2) -> tuple[list[FakePrefill], list[FakeDecode]]:
    """Workers whose decode half gives the whole answer."""
    decoders = [FakeDecode(f"decode-{number}") for number in range(decode)]
    for worker in decoders:
        worker.script = go_on()
    return [FakePrefill(f"prefill-{number}") for number in range(prefill)], decoders


def check_whole(events: list[pb.GenerateResponse]) -> None:
    """Neither a gap nor a duplicate, of tokens or of reports."""
    assert text_of(events) == ANSWER
    assert [token for event in events for token in event.delta.token_ids] == TOKENS
    order = kinds(events)
    assert (order[0], order[-1]) == ("started", "finished")
    for once in ("started", "compression", "transfer", "finished"):
        assert order.count(once) == 1, once
    assert events[-1].finished.usage == pb.Usage(prompt_tokens=50, visual_tokens=40, generated_tokens=len(TOKENS))


def check_counted_once(b: Bench) -> None:
    """The prompt, its compression and every token; each transfer, because its bytes were sent."""
    assert b.metric("prompt_tokens_total") == 50
    assert b.metric("kv_bytes_kept_total") == KEPT_BYTES
    assert b.metric("generation_tokens_total") == len(TOKENS)
    assert b.metric("requests_total", outcome="finished", code="OK") == 1
    assert b.router.accounting.totals.kv_kept_bytes == KEPT_BYTES


def once(first: Any, then: Any) -> Any:
    """A decode script that plays `first` for the first sequence that comes, whichever worker has it, then `then`."""
    seen: list[object] = []

    async def script(stream: Stream, handle: int, token: bytes) -> None:
        seen.append(token)
        await (first if len(seen) == 1 else then)(stream, handle, token)

    return script


async def breaks(stream: Stream, handle: int) -> None:
    stream.end()


def failovers(b: Bench, kind: str, reason: str) -> float:
    return b.metric("failovers_total", kind=kind, reason=reason) or 0.0


@pytest.mark.parametrize("cut", TOKENS[:-1])
def test_a_decode_worker_lost_after_any_token_is_replaced_by_a_resend(cut: int) -> None:
    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        script = once(go_on(until=cut, then=breaks), go_on())
        for worker in decode:
            worker.script = script
        async with bench(prefill, decode) as b:
            events = await b.answer()
            check_whole(events)
            await b.idle()
            check_counted_once(b)
            lost, other = sorted(decode, key=lambda worker: worker.reserves[0].attempt)
            assert (lost.delivered, other.delivered) == ([[1]], [TOKENS[:cut]])
            assert events[-1].finished.placement.decode_worker == other.info.name
            (sent,) = prefill[0].resends
            (reserve,) = other.reserves
            first = lost.reserves[0]
            assert list(reserve.answers) == [decode_pb2.ReservedAnswer(delivered_tokens=cut)]
            assert list(first.answers) == [decode_pb2.ReservedAnswer()]
            assert (reserve.kept_tokens_bound, reserve.prefill_epoch) == (first.kept_tokens_bound, first.prefill_epoch)
            assert reserve.arena_socket == first.arena_socket
            assert (sent.attempt, sent.ticket.decode_worker) == (reserve.attempt, other.info.name)
            assert len(prefill[0].requests) == 1
            assert failovers(b, "resend", "DECODE_WORKER_LOST") == 1
            assert b.metric("failover_seconds_count", answer="begun") == 1
            assert b.metric("kv_bytes_sent_total") == 2 * SENT_BYTES
            assert lost.releases == [b"token-1"]

    run(main)


def test_a_killed_decode_worker_is_replaced() -> None:
    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        for worker in decode:
            worker.script = go_on(until=3, then=lambda *_: forever())
        async with bench(prefill, decode, poll_interval_s=60.0) as b:
            call = b.ask()
            seen = [await call.read() for _ in range(6)]
            (victim,) = (worker for worker in decode if worker.attached)
            (other,) = (worker for worker in decode if worker is not victim)
            other.script = go_on()
            await victim.stop()
            check_whole([*seen, *await rest(call)])
            await b.idle()
            victim.live.clear()
            await victim.start(int(victim.address.rpartition(":")[2]))

    run(main)


@pytest.mark.parametrize("cut", TOKENS[:-1])
def test_without_the_parcel_the_prompt_is_computed_again_behind_what_was_delivered(cut: int) -> None:
    async def main() -> None:
        prefill, decode = pairs()
        script = once(go_on(until=cut, then=breaks), go_on())
        for worker in decode:
            worker.script = script
        for worker in prefill:
            worker.script = lambda _: [first_token(), compression(), transfer()]
        async with bench(prefill, decode) as b:
            check_whole(await b.answer())
            await b.idle()
            check_counted_once(b)
            again = [request for worker in prefill for request in worker.requests if request.delivered[0].tokens]
            assert [list(request.delivered[0].tokens) for request in again] == [TOKENS[:cut]]
            assert failovers(b, "reprefill", "DECODE_WORKER_LOST") == 1

    run(main)


@pytest.mark.parametrize("holder_lives", [True, False])
def test_a_parcel_that_is_gone_is_computed_again(holder_lives: bool) -> None:
    async def main() -> None:
        prefill, decode = pairs()
        goes_on = asyncio.Event()

        async def breaks_then(stream: Stream, handle: int) -> None:
            await goes_on.wait()
            stream.end()

        script = once(go_on(until=4, then=breaks_then), go_on())
        for worker in decode:
            worker.script = script
        async with bench(prefill, decode) as b:
            call = b.ask()
            seen = [await call.read() for _ in range(7)]
            (holder,) = (worker for worker in prefill if worker.requests)
            holder.parcels.clear()
            if not holder_lives:
                await holder.stop()
            goes_on.set()
            check_whole([*seen, *await rest(call)])
            await b.idle()
            check_counted_once(b)
            assert failovers(b, "resend", "DECODE_WORKER_LOST") == 1
            assert failovers(b, "reprefill", "NO_PARCEL" if holder_lives else "WORKER_UNREACHABLE") == 1
            if not holder_lives:
                await holder.start(int(holder.address.rpartition(":")[2]))

    run(main)


STARTS = {
    "before the first token": [],
    "after the first token": [first_token()],
    "after a look-ahead": [first_token(), next_token("B", 2)],
    "after compression": [first_token(), compression()],
    "while the parcel travels": [first_token(), compression(), retained()],
}


@pytest.mark.parametrize("start", list(STARTS))
def test_a_prefill_worker_lost_before_its_parcel_arrived_is_replaced(start: str) -> None:
    async def main() -> None:
        prefill, decode = pairs()
        script = once(hang, go_on()) if "compr" in start or "travels" in start else go_on()
        for worker in decode:
            worker.script = script
        ahead = [first_token(), next_token("B", 2), compression(), retained(), transfer()]

        def dies_once(request: prefill_pb2.PrefillRequest) -> list[Any]:
            if request.attempt == 1:
                return [*STARTS[start], errors.UnavailableError("killed")]
            return ahead if "look" in start else prompt_done()

        for worker in prefill:
            worker.script = dies_once
        async with bench(prefill, decode) as b:
            check_whole(await b.answer())
            # killed for good: nobody is there who could release it
            for worker in prefill:
                worker.parcels.discard(f"{worker.info.name}-parcel-1".encode())
            await b.idle()
            check_counted_once(b)
            first, second = sorted((request for worker in prefill for request in worker.requests), key=_attempt)
            said = [event.first_token.token_id or event.next_token.token_id for event in STARTS[start]]
            assert list(second.delivered[0].tokens) == [token for token in said if token]
            assert first.request.sampling.seed == second.request.sampling.seed
            assert first.epoch != second.epoch
            assert failovers(b, "reprefill", "UNAVAILABLE") == 1

    run(main)


def _attempt(request: prefill_pb2.PrefillRequest) -> int:
    return request.attempt


@pytest.mark.parametrize("has_parcel", [True, False])
def test_a_transfer_that_fails_at_the_decode_worker_is_repeated_to_another_one(has_parcel: bool) -> None:
    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        script = once(hang, go_on())
        for worker in decode:
            worker.script = script

        def fails_once(request: prefill_pb2.PrefillRequest) -> list[Any]:
            refusal = errors.AbortedError(
                "released", reason="RELEASED", stage="transfer", worker=request.ticket.decode_worker
            )
            kept = [retained()] if has_parcel else []
            return prompt_done() if request.attempt > 1 else [first_token(), compression(), *kept, refusal]

        prefill[0].script = fails_once
        async with bench(prefill, decode) as b:
            check_whole(await b.answer())
            await b.idle()
            check_counted_once(b)
            assert {len(worker.reserves) for worker in decode} == {1}
            assert len(prefill[0].resends) == has_parcel
            assert failovers(b, "resend" if has_parcel else "reprefill", "RELEASED") == 1

    run(main)


def test_a_decode_worker_lost_while_the_parcel_is_made_is_replaced_as_soon_as_it_is_there() -> None:
    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        lost, made = asyncio.Event(), asyncio.Event()

        async def breaks_now(stream: Stream, handle: int, token: bytes) -> None:
            stream.end()
            lost.set()

        script = once(breaks_now, go_on())
        for worker in decode:
            worker.script = script
        # the first transfer never ends: its receiver hangs
        prefill[0].script = lambda _: [first_token(), compression(), made.wait(), retained(), forever()]
        async with bench(prefill, decode) as b:
            asked = asyncio.create_task(b.answer())
            await lost.wait()
            made.set()
            check_whole(await asked)
            await b.idle()
            assert len(prefill[0].requests) == len(prefill[0].resends) == 1
            assert len(await prefill[0].cancelled.reaches(1)) > 0

    run(main)


@pytest.mark.parametrize("ending", ["transfer", "refused", "nothing"])
def test_a_decode_worker_lost_while_no_parcel_is_kept_costs_one_failover(ending: str) -> None:
    async def main() -> None:
        prefill, decode = pairs()
        lost = asyncio.Event()

        async def breaks_now(stream: Stream, handle: int, token: bytes) -> None:
            stream.end()
            lost.set()

        script = once(breaks_now, go_on())
        for worker in decode:
            worker.script = script

        def first_run(request: prefill_pb2.PrefillRequest) -> list[Any]:
            if request.delivered[0].tokens:
                return prompt_done()
            refusal = errors.AbortedError("gone", stage="transfer", worker=request.ticket.decode_worker)
            last = {"transfer": [transfer(), forever()], "refused": [refusal], "nothing": []}[ending]
            # long enough for the router to have seen the break
            return [first_token(), compression(), lost.wait(), asyncio.sleep(0.1), *last]

        for worker in prefill:
            worker.script = first_run
        async with bench(prefill, decode, max_failovers=1) as b:
            check_whole(await b.answer())
            await b.idle()
            assert failovers(b, "reprefill", "DECODE_WORKER_LOST") == 1

    run(main)


def test_both_workers_die() -> None:
    async def main() -> None:
        prefill, decode = pairs()
        script = once(go_on(until=3, then=lambda *_: forever()), go_on())
        for worker in decode:
            worker.script = script
        async with bench(prefill, decode, poll_interval_s=60.0) as b:
            call = b.ask()
            seen = [await call.read() for _ in range(6)]
            (holder,) = (worker for worker in prefill if worker.parcels)
            (victim,) = (worker for worker in decode if worker.live)
            await asyncio.gather(holder.stop(), victim.stop())
            check_whole([*seen, *await rest(call)])
            await b.idle()
            holder.parcels.clear()
            victim.live.clear()
            for worker in (holder, victim):
                await worker.start(int(worker.address.rpartition(":")[2]))

    run(main)


def test_several_losses_in_a_row() -> None:
    async def main() -> None:
        prefill, decode = pairs(decode=4)
        cuts = iter((2, 3, 5))
        for worker in decode:
            worker.script = go_on(until=8)

        async def script(stream: Stream, handle: int, token: bytes) -> None:
            cut = next(cuts, None)
            await (go_on() if cut is None else go_on(until=cut, then=breaks))(stream, handle, token)

        for worker in decode:
            worker.script = script
        async with bench(prefill, decode) as b:
            check_whole(await b.answer())
            await b.idle()
            assert {tuple(given) for worker in decode for given in worker.delivered} == {
                (1,),
                (1, 2),
                (1, 2, 3),
                (1, 2, 3, 4, 5),
            }
            assert {len(worker.delivered) for worker in decode} == {1}
            assert failovers(b, "resend", "DECODE_WORKER_LOST") == 3

    run(main)


@pytest.mark.parametrize(
    ("failure", "goes_on"),
    [
        (errors.AbortedError("the lease ended", reason="LEASE_EXPIRED"), True),
        (errors.UnavailableError("shutting down", reason="DRAINING"), True),
        (errors.NotFoundError("no such reservation"), True),
        (errors.InternalError("the step failed"), True),
        (errors.InvalidRequestError("not the parcel's tokens", reason="DELIVERED"), False),
        (errors.ContextTooLongError("too long"), False),
        (errors.ResourceExhaustedError("no room"), False),
    ],
    ids=lambda value: getattr(value, "code", value),
)
def test_which_failures_of_a_sequence_are_worth_another_worker(failure: errors.ServiceError, goes_on: bool) -> None:
    async def fails(stream: Stream, handle: int) -> None:
        stream.fail(handle, failure)

    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        script = once(go_on(until=4, then=fails), go_on())
        for worker in decode:
            worker.script = script
        async with bench(prefill, decode) as b:
            if goes_on:
                check_whole(await b.answer())
            else:
                error = await error_of(b)
                assert (type(error), error.stage) == (type(failure), "decode")
                assert error.worker.startswith("decode-")
            await b.idle()
            assert len(prefill[0].resends) == goes_on

    run(main)


def test_a_step_that_fails_on_two_workers_is_not_tried_on_a_third() -> None:
    async def fails(stream: Stream, handle: int) -> None:
        stream.fail(handle, errors.InternalError("the step failed"))

    async def main() -> None:
        prefill, decode = pairs(prefill=1, decode=3)
        for worker in decode:
            worker.script = go_on(until=4, then=fails)
        async with bench(prefill, decode) as b:
            assert (await error_of(b)).code == "INTERNAL"
            assert sum(len(worker.delivered) for worker in decode) == 2

    run(main)


def test_damaged_bytes_are_sent_again_and_then_computed_again() -> None:
    async def main() -> None:
        prefill, decode = pairs()
        script = once(hang, go_on())
        for worker in decode:
            worker.script = script

        def damaged(request: Any) -> errors.DataLossError:
            return errors.DataLossError("digest", stage="transfer", worker=request.ticket.decode_worker)

        def refuse(request: prefill_pb2.ResendRequest) -> None:
            raise damaged(request)

        def damages_once(request: prefill_pb2.PrefillRequest) -> list[Any]:
            if request.delivered[0].tokens:
                return prompt_done()
            return [first_token(), compression(), retained(), damaged(request)]

        for worker in prefill:
            worker.script = damages_once
            worker.on_resend = refuse
        async with bench(prefill, decode) as b:
            check_whole(await b.answer())
            await b.idle()
            assert sorted(len(worker.requests) for worker in prefill) == [1, 1]
            assert failovers(b, "resend", "DATA_LOSS") == failovers(b, "reprefill", "DATA_LOSS") == 1

    run(main)


def test_a_single_pair_goes_on_by_itself_when_its_stream_broke() -> None:
    async def main() -> None:
        prefill, decode = pairs(1, 1)
        decode[0].script = once(go_on(until=4, then=breaks), go_on())
        async with bench(prefill, decode) as b:
            check_whole(await b.answer())
            assert decode[0].delivered == [[1], [1, 2, 3, 4]]

    run(main)


def test_a_broken_stream_is_one_failure_of_its_worker_however_many_were_on_it() -> None:
    async def main() -> None:
        prefill, decode = pairs(1, 1)

        async def script(stream: Stream, handle: int, token: bytes) -> None:
            if len(decode[0].streams) > 1:
                await go_on()(stream, handle, token)
            elif len(decode[0].attached) == 12:
                stream.end()

        decode[0].script = script
        async with bench(prefill, decode) as b:
            for events in await asyncio.gather(*(b.answer() for _ in range(12))):
                check_whole(events)
            assert len(decode[0].streams) == 2

    run(main)


def test_nobody_left_names_stage_and_worker() -> None:
    async def main() -> None:
        prefill, decode = pairs(1, 1)
        decode[0].script = go_on(until=4, then=lambda *_: forever())
        async with bench(prefill, decode, poll_interval_s=60.0, comeback_s=0.3) as b:
            asked = asyncio.create_task(error_of(b))
            await decode[0].delivered.reaches(1)
            await decode[0].stop()
            error = await asked
            assert (error.code, error.reason) == ("UNAVAILABLE", "DECODE_WORKER_LOST")
            assert (error.stage, error.worker) == ("decode", "decode-0")
            await b.idle()
            decode[0].live.clear()
            await decode[0].start(int(decode[0].address.rpartition(":")[2]))

    run(main)


def test_a_request_that_has_lost_the_only_worker_waits_for_it_to_come_back() -> None:
    """Those that have not begun anywhere are refused meanwhile."""

    async def main() -> None:
        prefill, decode = pairs(1, 1)
        prefill[0].script = lambda _: [first_token(), forever()] if len(prefill[0].requests) == 1 else prompt_done()
        decode[0].script = once(go_on(until=4, then=lambda *_: forever()), go_on())
        async with bench(prefill, decode) as b:

            async def dies_and_comes_back(worker: FakePrefill | FakeDecode) -> None:
                await worker.stop()
                await b.becomes(lambda: b.worker(worker.info.name).state == "unreachable")
                assert (await error_of(b, request_id="new")).reason == "NO_WORKER"
                await worker.restart()

            asked = asyncio.create_task(b.answer())
            await prefill[0].requests.reaches(1)
            await dies_and_comes_back(prefill[0])
            await decode[0].delivered.reaches(1)
            decode[0].live.clear()
            await dies_and_comes_back(decode[0])
            check_whole(await asked)

    run(main)


def test_an_answer_that_has_begun_waits_for_memory_before_those_that_have_not() -> None:
    async def main() -> None:
        prefill, decode = pairs(1, 1)
        goes_on = asyncio.Event()

        async def breaks_then(stream: Stream, handle: int) -> None:
            await goes_on.wait()
            stream.end()

        decode[0].script = once(go_on(until=4, then=breaks_then), go_on())
        async with bench(prefill, decode, max_waiting=1) as b:
            begun = b.ask(request_id="begun")
            seen = [await begun.read() for _ in range(7)]
            decode[0].admit = full
            new = asyncio.create_task(b.answer(request_id="new"))
            await b.becomes_waiting(1)
            goes_on.set()
            # not refused, although the queue is full
            await b.becomes_waiting(2)
            decode[0].reserves.clear()
            decode[0].admit = lambda _: None
            check_whole([*seen, *await rest(begun)])
            check_whole(await new)
            assert [reserve.request_id for reserve in decode[0].reserves] == ["begun", "new"]
            assert len(prefill[0].resends) == 1

    run(main)


def test_memory_that_stays_short_ends_a_begun_answer_with_the_usual_error() -> None:
    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        script = once(go_on(until=4, then=breaks), go_on())

        def full_for_the_second(request: decode_pb2.ReserveRequest) -> None:
            if request.answers[0].delivered_tokens:
                full(request)

        for worker in decode:
            worker.script = script
            worker.admit = full_for_the_second
        async with bench(prefill, decode, queue_timeout_s=0.3) as b:
            error = await error_of(b)
            assert isinstance(error, errors.ResourceExhaustedError)
            assert error.retry_after_s is not None

    run(main)


def test_a_guarded_parcel_is_promised_what_it_has_grown_to() -> None:
    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        script = once(go_on(until=4, then=breaks), go_on())
        for worker in decode:
            worker.script = script
        grown = compression()
        grown.compression.kept_bytes = 200 * 256 - 1
        prefill[0].script = lambda _: [first_token(), grown, retained(), transfer()]
        async with bench(prefill, decode) as b:
            check_whole(await b.answer())
            first, second = sorted((worker.reserves[0] for worker in decode), key=lambda each: each.attempt)
            assert first.kept_tokens_bound < second.kept_tokens_bound == 200

    run(main)


def test_a_worker_that_draws_other_tokens_ends_the_answer_instead_of_garbling_it() -> None:
    async def main() -> None:
        prefill, decode = pairs()
        script = once(go_on(until=4, then=breaks), go_on())
        for worker in decode:
            worker.script = script

        def diverges(request: prefill_pb2.PrefillRequest) -> list[Any]:
            start = first_token()
            start.first_token.token_id = 9 if request.delivered[0].tokens else 1
            return [start, compression(), transfer()]

        for worker in prefill:
            worker.script = diverges
        async with bench(prefill, decode) as b:
            error = await error_of(b)
            assert (error.code, error.reason) == ("INTERNAL", "DIVERGED")

    run(main)


class StandStill:
    """A step that never ends, and says when it was reached."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()

    async def __call__(self, *_: object) -> None:
        self.reached.set()
        await forever()

    def on_reserve(self, request: decode_pb2.ReserveRequest) -> Any:
        return self() if request.answers[0].delivered_tokens else None

    def on_queue(self, request: decode_pb2.ReserveRequest) -> None:
        if request.answers[0].delivered_tokens:
            self.reached.set()
            full(request)

    def on_prefill(self, request: prefill_pb2.PrefillRequest) -> list[Any]:
        return [self()] if request.delivered[0].tokens else [first_token(), compression(), transfer()]


PHASES = {
    "queue": lambda stand, prefill, decode: setattr(decode, "admit", stand.on_queue),
    "reserve": lambda stand, prefill, decode: setattr(decode, "admit", stand.on_reserve),
    "resend": lambda stand, prefill, decode: setattr(prefill, "on_resend", stand),
    "prefill": lambda stand, prefill, decode: setattr(prefill, "script", stand.on_prefill),
    "decode": lambda stand, prefill, decode: None,
}


@pytest.mark.parametrize("phase", list(PHASES))
def test_a_client_that_leaves_during_a_failover_leaves_nothing_behind(phase: str) -> None:
    async def main() -> None:
        prefill, decode = pairs()
        stand = StandStill()
        script = once(go_on(until=4, then=breaks), stand)
        for sender, receiver in zip(prefill, decode, strict=True):
            receiver.script = script
            PHASES[phase](stand, sender, receiver)
        async with bench(prefill, decode, control_timeout_s=1.0) as b:
            call = b.ask()
            reading = asyncio.create_task(_drain(call))
            await asyncio.wait_for(stand.reached.wait(), 5)
            call.cancel()
            await reading
            await b.idle()
            assert b.metric("requests_total", outcome="cancelled", code="CANCELLED") == 1
            assert b.metric("num_requests_waiting") == 0

    run(main)


async def _drain(call: Any) -> None:
    with pytest.raises(asyncio.CancelledError):
        async for _ in call:
            pass


def test_the_deadline_wins_over_a_failover_and_names_its_stage() -> None:
    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        script = once(go_on(until=4, then=breaks), go_on())
        for worker in decode:
            worker.script = script
        prefill[0].on_resend = lambda _: forever()
        async with bench(prefill, decode) as b:
            with pytest.raises(Exception) as caught:
                await b.answer(timeout=1.0)
            assert "DEADLINE_EXCEEDED" in str(caught.value)
            assert "transfer" in str(caught.value)

    run(main)
