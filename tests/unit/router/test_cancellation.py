"""A client that leaves, at any stage, leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from vlcache.v1 import inference_pb2 as pb

from router.admission.callers import Callers
from router.requests.finished import FinishedAnswers
from router.requests.reception import Reception
from router.service import InferenceServicer
from shared import errors
from shared.rpc.status import from_rpc_error
from tests.unit.router.fakes import Bench, ask, bench, compression, first_token, forever, hang, run, transfer


def full(_) -> None:
    raise errors.ResourceExhaustedError("the pool is full")


async def cancelled(b: Bench, stage: str) -> None:
    """Waits until the router has taken notice."""
    await b.idle()
    assert b.metric("cancellations_total", stage=stage) == 1
    assert b.metric("requests_total", outcome="cancelled", code="CANCELLED") == 1
    assert b.metric("num_requests_running") == 0


def test_while_the_reservation_is_being_made() -> None:
    async def main() -> None:
        async with bench() as b:
            answer = asyncio.Event()
            b.decode[0].admit = lambda _: answer.wait()
            call = b.ask()
            await b.decode[0].reserves.reaches(1)
            call.cancel()
            await asyncio.wait_for(b.router.generations.idle(), 5)
            # the worker promises memory to a client that is gone: it gets it back
            answer.set()
            assert await b.decode[0].releases.reaches(1) == b"token-1"
            await cancelled(b, "queue")
            assert b.prefill[0].requests == []

    run(main)


def test_while_waiting_for_memory() -> None:
    async def main() -> None:
        async with bench() as b:
            b.decode[0].admit = full
            call = b.ask()
            await b.decode[0].reserves.reaches(2)
            call.cancel()
            await cancelled(b, "queue")
            assert b.metric("num_requests_waiting") == 0

    run(main)


def test_while_prefill_computes() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: [forever()]
            call = b.ask(request_id="gone")
            await b.prefill[0].requests.reaches(1)
            call.cancel()
            assert await b.prefill[0].cancelled.reaches(1) == "gone"
            assert await b.decode[0].releases.reaches(1) == b"token-1"
            await cancelled(b, "prefill")
            assert b.decode[0].attached == []

    run(main)


def test_while_the_parcel_travels() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script = lambda _: [first_token(), compression(), forever()]
            b.decode[0].script = hang
            call = b.ask(request_id="gone")
            handle = await b.decode[0].attached.reaches(1)
            call.cancel()
            assert await b.prefill[0].cancelled.reaches(1) == "gone"
            assert await b.decode[0].cancels.reaches(1) == handle
            assert await b.decode[0].releases.reaches(1) == b"token-1"
            await cancelled(b, "decode")

    run(main)


def test_while_tokens_stream() -> None:
    async def main() -> None:
        async with bench() as b:
            b.decode[0].script = hang
            call = b.ask()
            for _ in range(4):  # started, first token, compression, transfer
                await call.read()
            handle = await b.decode[0].attached.reaches(1)
            call.cancel()
            assert await b.decode[0].cancels.reaches(1) == handle
            assert await b.decode[0].releases.reaches(1) == b"token-1"
            await cancelled(b, "decode")
            assert b.prefill[0].cancelled == []

    run(main)


def test_a_client_that_vanishes_counts_as_one_that_cancels() -> None:
    async def main() -> None:
        async with bench() as b:
            b.decode[0].script = hang
            async with grpc.aio.insecure_channel(b.router.address) as channel:
                stub = type(b.stub)(channel)
                call = stub.Generate(
                    pb.GenerateRequest(messages=[pb.Message(role="user", parts=[pb.Part(text="hello")])])
                )
                await b.decode[0].attached.reaches(1)
            assert call.cancelled()
            await b.decode[0].releases.reaches(1)
            await cancelled(b, "decode")

    run(main)


def test_before_the_first_event_was_asked_for() -> None:
    """A handler that is cancelled at once never starts its generator, whose `finally` then never runs."""

    class Context:
        def __init__(self) -> None:
            self.callbacks: list[Callable[[object], None]] = []

        def time_remaining(self) -> None:
            return None

        def invocation_metadata(self) -> tuple[()]:
            return ()

        def add_done_callback(self, callback: Callable[[object], None]) -> None:
            self.callbacks.append(callback)

    async def main() -> None:
        async with bench() as b:
            parts = (b.router.generations, FinishedAnswers(), b.router.shadow, b.router.accounting, Callers(None))
            servicer = InferenceServicer(Reception(*parts), b.router.table, b.router.accounting)
            context: Any = Context()
            servicer.Generate(ask(request_id="early"), context)
            with pytest.raises(errors.DuplicateRequestError):
                servicer.Generate(ask(request_id="early"), context)
            for callback in context.callbacks:
                callback(context)
            await cancelled(b, "queue")

    run(main)


def test_others_on_the_same_stream_go_on() -> None:
    async def main() -> None:
        async with bench() as b:
            goes_on = asyncio.Event()

            async def script(stream, handle, token) -> None:
                await goes_on.wait()
                await finish(stream, handle, token)

            finish = b.decode[0].script
            b.decode[0].script = script
            staying, leaving = asyncio.create_task(b.answer()), b.ask()
            await b.decode[0].attached.reaches(2)
            leaving.cancel()
            await b.decode[0].cancels.reaches(1)
            goes_on.set()
            assert (await staying)[-1].HasField("finished")

    run(main)


@pytest.mark.parametrize("stage", ["queue", "prefill", "decode"])
def test_the_deadline_names_its_stage_and_releases_everything(stage: str) -> None:
    async def main() -> None:
        async with bench() as b:
            if stage == "queue":
                b.decode[0].admit = full
            elif stage == "prefill":
                b.prefill[0].script = lambda _: [forever()]
            else:
                b.prefill[0].script = lambda _: [first_token(), compression(), transfer()]
                b.decode[0].script = hang
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await b.answer(timeout=1.0)
            error = from_rpc_error(caught.value)
            assert error.code == "DEADLINE_EXCEEDED"
            assert stage in error.message
            await b.idle()
            assert b.decode[0].releases == ([] if stage == "queue" else [b"token-1"])
            assert b.metric("requests_total", outcome="failed", code="DEADLINE_EXCEEDED") == 1

    run(main)


def test_the_deadline_covers_a_reservation_that_is_not_answered() -> None:
    async def main() -> None:
        async with bench() as b:
            answer = asyncio.Event()
            b.decode[0].admit = lambda _: answer.wait()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await b.answer(timeout=0.5)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            answer.set()
            assert await b.decode[0].releases.reaches(1) == b"token-1"

    run(main)


def test_a_decode_worker_that_does_not_answer_is_given_up_after_the_control_timeout() -> None:
    async def main() -> None:
        async with bench(control_timeout_s=0.2, poll_interval_s=60.0) as b:
            b.decode[0].admit = lambda _: forever()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await b.answer()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    run(main)
