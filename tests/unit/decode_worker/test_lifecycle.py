"""However and whenever a request ends, its memory comes back, and not before its threads have let go."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker.worker import LoadedModel
from tests.unit.decode_worker.scripted import Gate, ScriptedEngine, deliver, held_installs, scripted
from tests.unit.decode_worker.serving import Served, TokenStream, failure, frames, run, until
from tests.unit.decode_worker.shipment import Shipment

HANDLE = 7


@dataclass
class Request:
    """One request that was brought to a stage."""

    token: bytes
    stream: TokenStream
    put: Any = None
    busy: Gate | None = None
    """The gate at which a thread stands that still uses the memory."""


async def bring_to(stage: str, served: Served, shipment: Shipment, engine: ScriptedEngine, installs: Gate) -> Request:
    promise, stream = await served.reserve(), served.stream()
    made = Request(promise.token, stream)
    if stage != "installed":
        await stream.attach(HANDLE, promise.token)
        await until(lambda: served.held.find(promise.token).answers[0].subscription)
    if stage == "reserved":
        return made
    sent = frames(promise.token, shipment.manifest(), shipment.body)
    if stage == "filling":
        made.put = served.open_put()
        for frame in sent[:2]:
            await made.put.write(frame)
        await until(lambda: served.held_bytes() == {"filling": promise.reserved_bytes})
    elif stage == "installing":
        installs.shut()
        made.put, made.busy = asyncio.create_task(served.put(sent)), installs
        await installs.reached()
    elif stage == "installed":
        await served.put(sent)
    elif stage == "decoding":
        engine.gate.shut()
        await served.put(sent)
        made.busy = engine.gate
        await engine.gate.reached()
    return made


async def end(how: str, served: Served, request: Request) -> None:
    if how == "release":
        for _ in range(2):
            await served.decode.Release(pb.ReleaseRequest(token=request.token))
    elif how == "cancel":
        await request.stream.cancel(HANDLE)
    elif how == "stream break":
        await request.stream.close()
    elif how == "expiry":
        served.worker.runner.expire(1e18)


async def finish_transfer(request: Request, shipment: Shipment) -> str:
    """Sends what is missing, if the sender is still at it; returns the code that it hears."""
    if isinstance(request.put, asyncio.Task):
        return (await failure(request.put)).code
    if request.put is None:
        return "ABORTED"
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for frame in frames(request.token, shipment.manifest(), shipment.body)[2:]:
            await request.put.write(frame)
        await request.put.done_writing()
    return (await failure(request.put)).code


ENDS = [
    *((stage, "release") for stage in ("reserved", "filling", "installing", "installed", "decoding")),
    *(
        (stage, how)
        for stage in ("reserved", "filling", "installing", "decoding")
        for how in ("cancel", "stream break")
    ),
    *((stage, "expiry") for stage in ("reserved", "filling", "installing", "installed")),
]


@pytest.mark.parametrize(("stage", "how"), ENDS)
def test_every_end_at_every_stage_gives_everything_back(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch, stage: str, how: str
) -> None:
    model, engine = scripted(loaded)
    installs = held_installs(monkeypatch)

    async def body(served: Served) -> None:
        request = await bring_to(stage, served, shipment, engine, installs)
        used = served.held_bytes()
        await end(how, served, request)
        await until(lambda: not list(served.held))
        renewal = await failure(served.decode.Renew(pb.RenewRequest(token=request.token)))
        assert (renewal.code, renewal.reason) == ("NOT_FOUND", "NO_RESERVATION")
        served.worker.runner.check_integrity()
        if request.busy is not None:
            assert served.held_bytes() == used, "a thread still uses the memory"
            request.busy.open()
        assert await finish_transfer(request, shipment) == "ABORTED"
        await served.nothing_is_held()
        if how == "expiry" and stage != "installed":
            (update,) = await request.stream.finished(HANDLE)
            assert (update.error.code, update.error.reason) == (grpc.StatusCode.ABORTED.value[0], "LEASE_EXPIRED")
        elif how != "stream break":
            assert request.stream.updates(HANDLE) == []
        # the memory, the id and the handle serve others
        token, stream = await deliver(served, shipment), served.stream()
        await stream.attach(HANDLE, token)
        assert len(await stream.tokens(HANDLE)) == 7

    run(model, body)


def test_a_waiting_sequence_leaves_without_a_step(loaded: LoadedModel, shipment: Shipment) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        engine.gate.shut()
        stream = served.stream()
        for handle, name in enumerate(("first", "waiting")):
            await stream.attach(handle, await deliver(served, shipment, name, seed=handle))
        await engine.gate.reached()
        await until(lambda: served.worker.servicer._scheduler.waiting == 1)
        await stream.cancel(1)
        await until(lambda: len(list(served.held)) == 1)
        engine.gate.open()
        assert len(await stream.tokens(0)) == 7
        await served.nothing_is_held()
        assert stream.updates(1) == []
        assert all(batch == [0] for batch in engine.batches)

    run(model, body, max_num_seqs=1)


def test_a_lease_that_nobody_renews_ends(loaded: LoadedModel) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        assert promise.lease_s == pytest.approx(0.05)
        await until(lambda: not list(served.held))
        metrics = served.worker.metrics
        assert metrics.labelled(metrics.lease_expired, side="decode")._value.get() == 1

    run(loaded, body, lease_s=0.05)


def test_a_renewal_extends_the_lease(loaded: LoadedModel) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        reservation = served.held.find(promise.token)
        reservation.expires_at -= 50
        before = reservation.expires_at
        answer = await served.decode.Renew(pb.RenewRequest(token=promise.token))
        assert answer.lease_s == 60
        assert reservation.expires_at >= before + 50

    run(loaded, body, lease_s=60.0)


def test_who_is_read_needs_no_renewal(loaded: LoadedModel, shipment: Shipment) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        engine.gate.shut()
        stream = served.stream()
        await stream.attach(HANDLE, await deliver(served, shipment))
        await engine.gate.reached()
        served.worker.runner.expire(1e18)
        engine.gate.open()
        assert len(await stream.tokens(HANDLE)) == 7

    run(model, body)


def test_attaching_to_nothing_is_answered_on_the_stream(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        stream = served.stream()
        await stream.attach(1, b"x" * 16)
        (update,) = await stream.finished(1)
        assert (update.error.code, update.error.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "NO_RESERVATION")
        assert update.error.message
        promise = await served.reserve()
        await stream.attach(2, promise.token)
        other = served.stream()
        await other.attach(3, promise.token)
        (update,) = await other.finished(3)
        assert (update.error.code, update.error.reason) == (grpc.StatusCode.FAILED_PRECONDITION.value[0], "ATTACHED")
        await other.cancel(3)  # not its sequence
        await served.put(frames(promise.token, shipment.manifest(), shipment.body))
        assert await stream.tokens(2) == shipment.expected

    run(loaded, body)


@pytest.mark.parametrize("how", ["stream break", "cancel"])
def test_one_stream_s_end_does_not_end_another_s_sequences(loaded: LoadedModel, shipment: Shipment, how: str) -> None:
    """Handles are each stream's own."""

    async def body(served: Served) -> None:
        breaking, staying = served.stream(), served.stream()
        gone, kept = await served.reserve(request_id="gone"), await served.reserve(request_id="kept")
        await breaking.attach(HANDLE, gone.token)
        await staying.attach(HANDLE, kept.token)
        await until(lambda: all(held.subscription for held in served.held.answers))
        await end(how, served, Request(gone.token, breaking))
        await until(lambda: [held.request_id for held in served.held] == ["kept"])
        await served.put(frames(kept.token, shipment.manifest("kept"), shipment.body))
        assert await staying.tokens(HANDLE) == shipment.expected

    run(loaded, body)


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"epoch": "other"}, "FAILED_PRECONDITION", "EPOCH"),
        ({"compatibility": "other"}, "FAILED_PRECONDITION", "INCOMPATIBLE"),
        ({"request_id": ""}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"kept_tokens_bound": 0}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"max_new_tokens": 0}, "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ({"kept_tokens_bound": 1 << 20}, "RESOURCE_EXHAUSTED", "TOO_LARGE"),
        ({"kept_tokens_bound": (1 << 32) - 1, "max_new_tokens": (1 << 32) - 1}, "RESOURCE_EXHAUSTED", "TOO_LARGE"),
    ],
)
def test_a_reservation_that_cannot_be_is_refused_and_costs_nothing(
    loaded: LoadedModel, changes: dict[str, Any], code: str, reason: str
) -> None:
    async def body(served: Served) -> None:
        error = await failure(served.reserve(**changes))
        assert (error.code, error.reason) == (code, reason)
        await served.nothing_is_held()

    run(loaded, body)


def test_a_full_pool_says_when_to_come_back(loaded: LoadedModel) -> None:
    async def body(served: Served) -> None:
        info = await served.info()
        tokens = info.kv.capacity // loaded.identity.layout.token_bytes
        await served.reserve(kept_tokens_bound=tokens - 7)
        error = await failure(served.reserve(request_id="s"))
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "KV_FULL")
        assert error.retry_after_s is not None
        assert (await failure(served.reserve())).code == "ALREADY_EXISTS"

    run(loaded, body)
