"""A decode worker is lost, and the prefill worker sends its parcel to another one, over real gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import prefill_pb2 as pb

from prefill_worker.config import PrefillConfig
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.worker import LoadedModel, load_model
from shared.errors import DataLossError, InternalError, ServiceError
from tests.unit.prefill_worker.pieces import until
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture
from tests.unit.prefill_worker.served import Sink, Stack, failure, run

PARTS = (encoded(picture(1)), QUESTION)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(PrefillConfig(model=str(checkpoint), dtype="float32"))


class Gate:
    """Stands before every pass."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, prefill = Gate(), PrefillEngine.prefill

    def held(engine: PrefillEngine, *args: Any, **options: Any) -> Any:
        gate.reached.set()
        assert gate.open.wait(15)
        return prefill(engine, *args, **options)

    monkeypatch.setattr(PrefillEngine, "prefill", held)
    yield gate
    gate.open.set()


class Followed:
    """A call that runs to its end by itself: what came, and the error."""

    def __init__(self, stack: Stack, request: pb.PrefillRequest) -> None:
        self.parcel = request.parcel
        self.call = stack.stub.Prefill(request)
        self.events: list[pb.PrefillEvent] = []
        self.task = asyncio.create_task(failure(self._follow()))

    async def _follow(self) -> None:
        async for event in self.call:
            self.events.append(event)

    async def error(self) -> ServiceError:
        return await self.task

    @property
    def kinds(self) -> list[str | None]:
        return [event.WhichOneof("event") for event in self.events]


def same_but_for_the_attempt(sink: Sink, *attempts: int) -> None:
    """All parcels that it has are one, sent in these attempts."""
    assert [manifest.transfer.attempt for _, manifest, _ in sink.parcels] == list(attempts)
    for _, manifest, body in sink.parcels:
        manifest.check_digest(memoryview(body))
        transfer = dataclasses.replace(manifest.transfer, attempt=0)
        first = sink.parcels[0][1]
        assert dataclasses.replace(manifest, transfer=transfer) == dataclasses.replace(first, transfer=transfer)
        assert body == sink.parcels[0][2]


@pytest.mark.parametrize("first", ["grpc", "memory"])
def test_the_same_parcel_goes_out_over_any_transport_as_often_as_asked(loaded: LoadedModel, first: str) -> None:
    async def body(stack: Stack) -> None:
        parcel = await stack.retained(*PARTS, ticket=stack.ticket(stack.sink, transport=first))
        for attempt, transport in ((2, "grpc"), (3, "memory"), (7, "grpc")):
            report = await stack.resend(parcel, stack.sink, attempt=attempt, transport=transport, token=b"other")
            assert report.transport == transport
            assert report.sent_bytes > len(stack.sink.parcels[0][2])
        same_but_for_the_attempt(stack.sink, 1, 2, 3, 7)
        assert [token for token, _, _ in stack.sink.parcels] == [b"t" * 16, *3 * [b"other"]]
        await stack.release(parcel)
        stack.nothing_is_held()

    run(loaded, body)


def test_several_get_it_at_the_same_time(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        sinks = [await stack.decode_worker() for _ in range(3)]
        for sink in sinks:
            sink.taking.clear()
        parcel = await stack.retained(*PARTS)
        sending = [asyncio.create_task(stack.resend(parcel, sink)) for sink in sinks]
        for sink in sinks:
            await sink.begun.wait()
        await stack.release(parcel)
        assert (await stack.kv()).retained > 0, "it is being sent"
        for sink in sinks:
            sink.taking.set()
        await asyncio.gather(*sending)
        assert {sink.parcels[0][2] for sink in sinks} == {stack.sink.parcels[0][2]}
        stack.nothing_is_held()

    run(loaded, body)


@pytest.mark.parametrize("how", ["killed", "released"])
def test_a_decode_worker_that_is_lost_during_the_pass_does_not_end_it(
    loaded: LoadedModel, gate: Gate, how: str
) -> None:
    async def body(stack: Stack) -> None:
        request = stack.request(*PARTS, ticket=stack.ticket(stack.sink, decode_worker="d7", lease_s=1.2))
        followed = Followed(stack, request)
        await until(gate.reached.is_set)
        stack.sink.lost = True
        if how == "killed":
            await stack.kill(stack.sink)
        else:
            before = stack.sink.renewals
            await until(lambda: stack.sink.renewals > before)
            await asyncio.sleep(0.5)
            assert stack.sink.renewals == before + 1
        gate.open.set()
        error = await followed.error()
        assert followed.kinds == ["first_token", "compression", "retained"]
        assert error.stage == "transfer"
        assert (error.code, error.worker) == ("UNAVAILABLE" if how == "killed" else "NOT_FOUND", "d7")
        other = await stack.decode_worker()
        await stack.resend(followed.parcel, other)
        same_but_for_the_attempt(other, 2)
        await stack.release(followed.parcel)
        stack.nothing_is_held()

    run(loaded, body)


@pytest.mark.parametrize("transport", ["grpc", "memory"])
def test_a_decode_worker_that_is_lost_during_the_transfer_leaves_the_parcel(
    loaded: LoadedModel, transport: str
) -> None:
    async def body(stack: Stack) -> None:
        stack.sink.taking.clear()
        followed = Followed(stack, stack.request(*PARTS, ticket=stack.ticket(stack.sink, transport=transport)))
        await stack.sink.begun.wait()
        await stack.kill(stack.sink)
        error = await followed.error()
        assert (error.code, error.stage, error.worker) == ("UNAVAILABLE", "transfer", "d")
        other = await stack.decode_worker()
        await stack.resend(followed.parcel, other, transport=transport)
        same_but_for_the_attempt(other, 2)
        await stack.release(followed.parcel)
        stack.nothing_is_held()

    run(loaded, body)


def test_a_lost_decode_worker_can_be_told_from_the_prefill_worker(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        error = await failure(stack.prefill(stack.request("hi " * 600)))
        assert (error.stage, error.worker) == ("preprocess", "p")
        stack.sink.refusals = [InternalError("odd", stage="install")]
        error = await failure(stack.prefill(stack.request("hi")))
        assert (error.stage, error.worker) == ("transfer", "d")

    run(loaded, body)


def test_a_parcel_that_was_damaged_is_sent_once_more(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        stack.sink.refusals = [DataLossError("broken", reason="CHUNK_CHECKSUM")]
        parcel = await stack.retained(*PARTS)
        same_but_for_the_attempt(stack.sink, 1)
        stack.sink.refusals = [DataLossError("broken", reason="CHUNK_CHECKSUM") for _ in range(2)]
        error = await failure(stack.resend(parcel, stack.sink))
        assert (error.code, error.reason, error.stage) == ("DATA_LOSS", "CHUNK_CHECKSUM", "transfer")
        metrics = stack.worker.metrics
        counted = {reason: metrics.labelled(metrics.resends, reason=reason) for reason in ("data_loss", "failover")}
        assert {reason: metric._value.get() for reason, metric in counted.items()} == {"data_loss": 2, "failover": 1}

    run(loaded, body)


@pytest.mark.parametrize("where", ["pass", "transfer"])
def test_a_client_that_leaves_takes_everything_along(loaded: LoadedModel, gate: Gate, where: str) -> None:
    async def body(stack: Stack) -> None:
        stack.sink.taking.clear()
        if where == "transfer":
            gate.open.set()
        followed = Followed(stack, stack.request(*PARTS))
        await until(gate.reached.is_set)
        if where == "transfer":
            await stack.sink.begun.wait()
            assert (await stack.kv()).retained > 0
        followed.call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await followed.error()
        if where == "transfer":
            await asyncio.wait_for(stack.sink.broken.wait(), 5)
        await until(lambda: stack.worker.runner._jobs == {} or where == "pass")
        gate.open.set()
        await until(lambda: not stack.worker.runner._jobs)
        stack.nothing_is_held()

    run(loaded, body)


def test_a_resend_that_is_cancelled_reaches_the_decode_worker(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        parcel = await stack.retained(*PARTS)
        stack.sink.taking.clear()
        stack.sink.begun.clear()
        call = stack.stub.Resend(pb.ResendRequest(parcel=parcel, attempt=2, ticket=stack.ticket(stack.sink)))
        await stack.sink.begun.wait()
        call.cancel()
        await asyncio.wait_for(stack.sink.broken.wait(), 5)
        await until(lambda: not stack.worker.runner._resends)
        await stack.release(parcel)
        stack.nothing_is_held()

    run(loaded, body)


def test_a_resend_keeps_its_reservation_alive(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        parcel = await stack.retained(*PARTS)
        other = await stack.decode_worker()
        other.taking.clear()
        resend = asyncio.create_task(stack.resend(parcel, other, lease_s=0.06))
        await until(lambda: other.renewals >= 2)
        other.taking.set()
        await resend

    run(loaded, body)


BAD_TICKETS = [({"lease_s": 0}, "INVALID_ARGUMENT"), ({"transport": "pigeon"}, "FAILED_PRECONDITION")]


@pytest.mark.parametrize(("ticket", "code"), BAD_TICKETS)
def test_a_bad_ticket_is_refused_and_the_parcel_stays(loaded: LoadedModel, ticket: dict[str, Any], code: str) -> None:
    async def body(stack: Stack) -> None:
        parcel = await stack.retained(*PARTS)
        assert (await failure(stack.resend(parcel, stack.sink, **ticket))).code == code
        assert await stack.gone(parcel) == []

    run(loaded, body)


def test_what_is_gone_is_said(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        parcel = await stack.retained(*PARTS)
        assert await stack.gone(b"never", parcel, b"") == [b"never", b""]
        await stack.release(parcel, b"never", parcel)
        assert await stack.gone(parcel) == [parcel]
        error = await failure(stack.resend(parcel, stack.sink))
        assert (error.code, error.reason, error.worker) == ("NOT_FOUND", "NO_PARCEL", "p")
        stack.nothing_is_held()

    run(loaded, body)


def test_a_parcel_lives_while_it_is_renewed(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_worker.worker.EXPIRY_PERIOD_S", 0.02)

    async def body(stack: Stack) -> None:
        request = stack.request(*PARTS)
        (told,) = (event.retained for event in await stack.prefill(request) if event.HasField("retained"))
        assert told.lease_s == 12.5
        parcel, retained = request.parcel, stack.worker.runner._retained
        ends_at = retained._by_secret[parcel].expires_at
        assert await stack.gone(parcel) == []
        assert retained._by_secret[parcel].expires_at > ends_at
        retained.lease_s = 0.05
        await stack.gone(parcel)
        await until(lambda: not stack.worker.info().kv.retained)
        assert await stack.gone(parcel) == [parcel]
        metrics = stack.worker.metrics
        assert metrics.labelled(metrics.lease_expired, side="prefill")._value.get() == 1

    run(loaded, body, parcel_lease_s=12.5)


def test_tokens_before_the_worker_are_shown(loaded: LoadedModel, gate: Gate) -> None:
    """What autoscalers look at is what placement looks at."""

    async def body(stack: Stack) -> None:
        def shown() -> float | None:
            return stack.worker.metrics.registry.get_sample_value(
                "vlcache_outstanding_tokens", fixed_labels(stack, loaded)
            )

        assert shown() == 0
        call = asyncio.create_task(stack.retained(*PARTS))
        await until(gate.reached.is_set)
        assert shown() == stack.worker.info().outstanding_tokens > 0
        gate.open.set()
        await call
        assert shown() == 0

    run(loaded, body)


def fixed_labels(stack: Stack, loaded: LoadedModel) -> dict[str, str]:
    return {"role": "prefill", "worker": stack.worker.name, "model": loaded.identity.name}


def test_bytes_are_shown_by_state(loaded: LoadedModel, gate: Gate) -> None:
    async def body(stack: Stack) -> None:
        def shown() -> dict[str, float]:
            labels = fixed_labels(stack, loaded)
            read = partial(stack.worker.metrics.registry.get_sample_value, "vlcache_kv_resident_bytes")
            return {state: read({**labels, "state": state}) or 0.0 for state in ("filling", "retained")}

        call = asyncio.create_task(stack.retained(*PARTS))
        await until(gate.reached.is_set)
        kv = await stack.kv()
        assert kv.filling > 0
        assert kv.retained == 0
        assert shown() == {"filling": kv.filling, "retained": 0}
        gate.open.set()
        parcel = await call
        kept = len(stack.sink.parcels[0][2])
        assert 0 <= (await stack.kv()).retained - kept < 64
        assert shown() == {"filling": 0, "retained": (await stack.kv()).retained}
        await stack.release(parcel)
        assert shown() == {"filling": 0, "retained": 0}

    run(loaded, body)


@pytest.mark.parametrize(("settings", "asked"), [({"retained_mib": 0}, {}), ({}, {"parcel": b""})])
def test_a_worker_that_retains_nothing_says_nothing(
    loaded: LoadedModel, settings: dict[str, Any], asked: dict[str, Any]
) -> None:
    async def body(stack: Stack) -> None:
        events = await stack.prefill(stack.request(*PARTS, **asked))
        assert [event.WhichOneof("event") for event in events] == ["first_token", "compression", "transfer"]
        await until(lambda: not stack.worker.runner._jobs)
        stack.nothing_is_held()

    run(loaded, body, **settings)


def test_a_draining_worker_still_resends(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        parcel = await stack.retained(*PARTS)
        stack.worker.servicer.start_draining()
        await stack.resend(parcel, stack.sink)
        same_but_for_the_attempt(stack.sink, 1, 2)
        await stack.worker.drain(5)
        stack.nothing_is_held()
        assert await stack.gone(parcel) == [parcel]

    run(loaded, body)


def sampled(**sampling: Any) -> public.SamplingParams:
    return public.SamplingParams(**({"max_new_tokens": 8, "ignore_eos": True} | sampling))


@pytest.mark.parametrize("sampling", [sampled(), sampled(temperature=1.5, seed=11)])
def test_a_new_pass_that_knows_the_answer_makes_the_same_parcel(
    loaded: LoadedModel, sampling: public.SamplingParams
) -> None:
    async def body(stack: Stack) -> None:
        request = stack.request(*PARTS)
        request.request.sampling.CopyFrom(sampling)
        before = await stack.prefill(request)
        # what followed the first token came from the decode worker
        request.delivered.add(tokens=[before[0].first_token.token_id, 7, 9])
        request.attempt, request.parcel = 2, b"another secret.."
        after = await stack.prefill(request)
        assert [event for event in after if event.WhichOneof("event") in ("first_token", "compression")] == before[:2]
        same_but_for_the_attempt(stack.sink, 1, 2)

    run(loaded, body)


@pytest.mark.parametrize("delivered", [[1 << 20], [5] * 8, [5] * 9])
def test_what_cannot_have_been_delivered_is_refused(loaded: LoadedModel, delivered: list[int]) -> None:
    async def body(stack: Stack) -> None:
        error = await failure(stack.prefill(stack.request("hi", delivered=[pb.DeliveredTokens(tokens=delivered)])))
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DELIVERED")
        stack.nothing_is_held()

    run(loaded, body)


@pytest.mark.parametrize("rpc", ["prefill", "resend"])
def test_a_drain_ends_what_is_late_with_an_answer(loaded: LoadedModel, rpc: str) -> None:
    async def body(stack: Stack) -> None:
        parcel = await stack.retained(*PARTS)
        stack.sink.taking.clear()
        stack.sink.begun.clear()
        call = stack.prefill(stack.request(*PARTS)) if rpc == "prefill" else stack.resend(parcel, stack.sink)
        late = asyncio.create_task(failure(call))
        await stack.sink.begun.wait()
        await stack.worker.drain(0.02)
        stack.nothing_is_held()
        assert (await late).reason == "DRAINING"

    run(loaded, body)
