"""Parcels from the prefill half of the same process."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from decode_worker.answers import Stage
from decode_worker.worker import LoadedModel
from prefill_worker.kv_sender import KVSender, Ticket
from shared.errors import AbortedError, AlreadyCommittedError, NotFoundError, ServiceError
from shared.kv.arena import Slot
from shared.kv.extents import Extent
from shared.kv.manifest import Manifest, TransferId
from shared.kv.transport.base import Parcel
from shared.kv.transport.local import LocalTransport
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.scripted import held_installs
from tests.unit.decode_worker.serving import Served, failure, frames, run, until
from tests.unit.decode_worker.shipment import Shipment, answers

NO_SLOT = Slot(Extent(0, 64), 1)


async def reserve(served: Served, **changes: Any) -> tuple[bytes, str]:
    """Memory for a parcel of this very process: the reservation's secret, and the process's boot id."""
    epoch = (await served.info()).epoch
    promise = await served.reserve(prefill_epoch=epoch, **changes)
    assert promise.transport == "local"
    return promise.token, epoch


def manifest_of(shipment: Shipment, epoch: str, **changes: Any) -> Manifest:
    transfer = TransferId(request_id="r", attempt=1, prefill_epoch=epoch)
    return shipment.manifest(**({"transfer": transfer} | changes))


def test_the_own_process_is_known_by_its_boot_id(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        token, _ = await reserve(served)
        assert served.held.find(token).arena is None
        assert (await served.reserve(request_id="s", prefill_epoch="other")).transport == "grpc"

    run(loaded, body)


def test_it_may_be_declined_by_configuration(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        epoch = (await served.info()).epoch
        assert (await served.reserve(prefill_epoch=epoch)).transport == "grpc"

    run(loaded, body, transport="grpc")


def test_a_parcel_is_installed_without_its_digest(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        token, epoch = await reserve(served)
        manifest = manifest_of(shipment, epoch, digest=b"")
        error = await failure(served.put(frames(token, manifest, shipment.body)))
        assert error.reason == "PARCEL_DIGEST"
        await served.worker.receiver.take(token, manifest, memoryview(shipment.body))
        await answers(served, token, shipment)

    run(loaded, body)


REFUSED: dict[str, dict[str, Any]] = {
    "TRANSFER_ID": {"transfer": TransferId(request_id="r", attempt=2, prefill_epoch="?")},
    "INCOMPATIBLE_PARCEL": {"compatibility": "other weights"},
    "PARCEL_MANIFEST": {"logical_length": 1},
    "UNKNOWN_TOKEN": {"generated": (1 << 30,)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_parcel_leaves_the_promise_as_it_was(loaded: LoadedModel, shipment: Shipment, reason: str) -> None:
    async def body(served: Served) -> None:
        token, epoch = await reserve(served)
        bad = manifest_of(shipment, epoch, **REFUSED[reason])
        with pytest.raises(ServiceError) as caught:
            await served.worker.receiver.take(token, bad, memoryview(shipment.body))
        assert caught.value.reason == reason
        assert served.held.find(token).stage is Stage.RESERVED
        await served.worker.receiver.take(token, manifest_of(shipment, epoch), memoryview(shipment.body))
        with pytest.raises(AlreadyCommittedError):
            await served.worker.receiver.take(token, manifest_of(shipment, epoch), memoryview(shipment.body))
        await answers(served, token, shipment)

    run(loaded, body)


def test_an_unknown_secret_is_refused(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        with pytest.raises(NotFoundError):
            await served.worker.receiver.take(b"?", shipment.manifest(), memoryview(shipment.body))
        with pytest.raises(NotFoundError):
            served.worker.receiver.renew(b"?")

    run(loaded, body)


@pytest.mark.parametrize("how", ["released", "cancelled"])
def test_memory_outlives_a_hand_over_that_is_broken_off(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    gate = held_installs(monkeypatch)

    async def body(served: Served) -> None:
        token, epoch = await reserve(served)
        parcel = Parcel(manifest=manifest_of(shipment, epoch), body=memoryview(shipment.body), slot=NO_SLOT)
        gate.shut()
        sending = asyncio.create_task(LocalTransport(served.worker.receiver).send(parcel, token))
        await gate.reached()
        if how == "released":
            served.worker.runner.end_all(served.held.find(token))
        else:
            sending.cancel()
        await asyncio.wait([sending], timeout=0.05)
        assert not sending.done(), "the thread still reads the body"
        assert served.held_bytes().keys() == {"filling"}
        gate.open()
        with pytest.raises(AbortedError if how == "released" else asyncio.CancelledError):
            await sending
        if how == "cancelled":
            assert served.held.find(token).stage is Stage.RESERVED
            served.worker.runner.end_all(served.held.find(token))
        await served.nothing_is_held()

    run(loaded, body)


def test_the_sender_hands_over_and_renews_without_a_call(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        token, epoch = await reserve(served)
        promised_until = served.held.find(token).expires_at
        metrics = PrefillMetrics(worker="p", model="tiny")
        sender = KVSender(epoch=epoch, metrics=metrics, local=served.worker.receiver)
        ticket = Ticket(decode_worker="d", address="127.0.0.1:1", token=token, transport="local", lease_s=0.06)
        parcel = Parcel(manifest=manifest_of(shipment, epoch), body=memoryview(shipment.body), slot=NO_SLOT)
        async with sender.keep_alive(ticket):
            await until(lambda: served.held.find(token).expires_at > promised_until)
            report = await sender.send(parcel, ticket)
        assert report == dataclasses.replace(report, transport="local", sent_bytes=0)
        assert metrics.labelled(metrics.transfer_bytes, transport="local")._value.get() == 0
        assert not sender._lines
        await answers(served, token, shipment)

    run(loaded, body)


def test_the_sender_hears_at_its_transfer_that_the_reservation_has_ended(
    loaded: LoadedModel, shipment: Shipment
) -> None:
    async def body(served: Served) -> None:
        token, epoch = await reserve(served)
        sender = KVSender(epoch=epoch, metrics=PrefillMetrics(worker="p", model="m"), local=served.worker.receiver)
        ticket = Ticket(decode_worker="d", address="", token=token, transport="local", lease_s=0.06)
        parcel = Parcel(manifest=manifest_of(shipment, epoch), body=memoryview(shipment.body), slot=NO_SLOT)
        async with sender.keep_alive(ticket):
            served.worker.runner.end_all(served.held.find(token))
            await asyncio.sleep(0.05)
            with pytest.raises(NotFoundError) as caught:
                await sender.send(parcel, ticket)
        assert caught.value.reason == "NO_RESERVATION"

    run(loaded, body)


def test_a_prefill_worker_without_a_decode_half_has_no_such_way(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        token, epoch = await reserve(served)
        sender = KVSender(epoch=epoch, metrics=PrefillMetrics(worker="p", model="m"))
        ticket = Ticket(decode_worker="d", address=served.address, token=token, transport="local", lease_s=30)
        parcel = Parcel(manifest=manifest_of(shipment, epoch), body=memoryview(shipment.body), slot=NO_SLOT)
        with pytest.raises(ServiceError) as caught:
            await sender.send(parcel, ticket)
        assert caught.value.reason == "TRANSPORT"
        await sender.close()

    run(loaded, body)
