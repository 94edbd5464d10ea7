"""Parcels through shared memory: a real arena of a prefill worker in the same process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from vlcache.worker.v1 import kv_pb2

from decode_worker.answers import Stage
from decode_worker.worker import LoadedModel
from prefill_worker.kv_sender import KVSender, Ticket
from shared.kv.arena import Arena, Slot
from shared.kv.arena_socket import ArenaServer
from shared.kv.transport.base import Parcel
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.serving import EPOCH, Served, failure, frames, run
from tests.unit.decode_worker.shipment import Shipment, answers


class Sender:
    """A prefill worker's arena with one parcel in it."""

    def __init__(self, arena: Arena, server: ArenaServer, shipment: Shipment) -> None:
        self.arena, self.socket, self.shipment = arena, str(server.path), shipment
        self.slot = self._written()

    def _written(self) -> Slot:
        slot = self.arena.allocate(len(self.shipment.body))
        assert slot is not None
        self.view(slot)[:] = self.shipment.body
        return slot

    def view(self, slot: Slot) -> memoryview:
        return self.arena.view(slot, len(self.shipment.body))

    def request(self, token: bytes, **changes: Any) -> kv_pb2.InstallKVRequest:
        place: dict[str, Any] = {
            "arena": EPOCH,
            "offset": self.slot.extent.offset,
            "nbytes": len(self.shipment.body),
        }
        slot = kv_pb2.ArenaSlot(**(place | changes))
        return kv_pb2.InstallKVRequest(token=token, manifest=self.shipment.manifest().to_proto(), slot=slot)


@contextlib.asynccontextmanager
async def sending(shipment: Shipment, epoch: str = EPOCH) -> AsyncIterator[Sender]:
    with tempfile.TemporaryDirectory() as directory:
        arena = Arena(1 << 16)
        assert arena.allocate(64), "the parcel does not lie at offset 0"
        server = ArenaServer.start(Path(directory) / "arenas", "p", arena, epoch)
        try:
            yield Sender(arena, server, shipment)
        finally:
            await server.stop()
            arena.close()


def run_with_arena(
    loaded: LoadedModel, shipment: Shipment, body: Callable[[Served, Sender], Awaitable[None]], **settings: Any
) -> None:
    async def with_sender(served: Served) -> None:
        async with sending(shipment) as sender:
            await body(served, sender)

    run(loaded, with_sender, **settings)


def test_a_parcel_is_read_in_place(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served, sender: Sender) -> None:
        promise = await served.reserve(arena_socket=sender.socket)
        assert promise.transport == "memory"
        await served.transfer.InstallKV(sender.request(promise.token))
        sender.view(sender.slot)[:] = bytes(len(shipment.body))  # answered: the slot may be reused
        sender.arena.free(sender.slot)
        await answers(served, promise.token, shipment)

    run_with_arena(loaded, shipment, body)


REFUSED = {
    "beyond the end": ({"offset": 1 << 16}, "FAILED_PRECONDITION", "ARENA_BOUNDS"),
    "across the end": ({"offset": (1 << 16) - 64}, "FAILED_PRECONDITION", "ARENA_BOUNDS"),
    "far away": ({"offset": (1 << 64) - 1}, "FAILED_PRECONDITION", "ARENA_BOUNDS"),
    "another arena": ({"arena": "other"}, "FAILED_PRECONDITION", "ARENA"),
    "another size": ({"nbytes": 64}, "INVALID_ARGUMENT", "ARENA_BOUNDS"),
    "another place": ({"offset": 0}, "DATA_LOSS", "PARCEL_DIGEST"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_slot_that_is_not_the_parcel_is_refused(loaded: LoadedModel, shipment: Shipment, what: str) -> None:
    changes, code, reason = REFUSED[what]

    async def body(served: Served, sender: Sender) -> None:
        promise = await served.reserve(arena_socket=sender.socket)
        error = await failure(served.transfer.InstallKV(sender.request(promise.token, **changes)))
        assert (error.code, error.reason) == (code, reason)
        assert served.held.find(promise.token).stage is Stage.RESERVED
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        await served.transfer.InstallKV(sender.request(promise.token))
        await answers(served, promise.token, shipment)

    run_with_arena(loaded, shipment, body)


@pytest.mark.parametrize("byte", [0, 1000, -1])
def test_a_slot_that_was_reused_meanwhile_is_data_loss(loaded: LoadedModel, shipment: Shipment, byte: int) -> None:
    async def body(served: Served, sender: Sender) -> None:
        promise = await served.reserve(arena_socket=sender.socket)
        sender.view(sender.slot)[byte] ^= 1
        error = await failure(served.transfer.InstallKV(sender.request(promise.token)))
        assert (error.code, error.reason) == ("DATA_LOSS", "PARCEL_DIGEST")
        assert served.held.find(promise.token).stage is Stage.RESERVED
        sender.view(sender.slot)[byte] ^= 1
        await served.transfer.InstallKV(sender.request(promise.token))
        await answers(served, promise.token, shipment)

    run_with_arena(loaded, shipment, body)


def test_a_reservation_without_an_arena_takes_no_slot(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served, sender: Sender) -> None:
        promise = await served.reserve()
        error = await failure(served.transfer.InstallKV(sender.request(promise.token)))
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "ARENA")
        await served.put(frames(promise.token, shipment.manifest(), shipment.body))
        await answers(served, promise.token, shipment)

    run_with_arena(loaded, shipment, body)


def test_a_second_delivery_is_refused(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served, sender: Sender) -> None:
        promise = await served.reserve(arena_socket=sender.socket)
        await served.transfer.InstallKV(sender.request(promise.token))
        error = await failure(served.transfer.InstallKV(sender.request(promise.token)))
        assert error.reason == "ALREADY_COMMITTED"
        await answers(served, promise.token, shipment)

    run_with_arena(loaded, shipment, body)


def test_an_arena_that_cannot_be_mapped_or_trusted_means_grpc(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        async with sending(shipment, epoch="another boot") as sender:
            with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as silent:
                path = f"{directory}/silent.sock"
                silent.bind(path)
                nowhere = [f"{directory}/none.sock", path, directory, "x" * 500]
                for number, where in enumerate([*nowhere, sender.socket]):
                    promise = await served.reserve(request_id=str(number), arena_socket=where)
                    assert promise.transport == "grpc", where

    run(loaded, body)


def test_an_arena_may_be_declined_by_configuration(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served, sender: Sender) -> None:
        assert (await served.reserve(arena_socket=sender.socket)).transport == "grpc"

    run_with_arena(loaded, shipment, body, transport="grpc")


def test_an_arena_is_mapped_once(loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(served: Served, sender: Sender) -> None:
        first = await served.reserve(arena_socket=sender.socket)
        monkeypatch.setattr("decode_worker.arena_directory.fetch_arena", lambda *_: pytest.fail("mapped again"))
        second = await served.reserve(request_id="s", arena_socket=sender.socket)
        assert first.transport == second.transport == "memory"

    run_with_arena(loaded, shipment, body)


@pytest.mark.parametrize("transport", ["memory", "grpc"])
def test_the_prefill_worker_s_own_sender_delivers(loaded: LoadedModel, shipment: Shipment, transport: str) -> None:
    async def body(served: Served, sender: Sender) -> None:
        where = sender.socket if transport == "memory" else ""
        promise = await served.reserve(arena_socket=where)
        assert promise.transport == transport
        metrics = PrefillMetrics(worker="p", model="tiny")
        kv_sender = KVSender(epoch=EPOCH, metrics=metrics)
        ticket = Ticket(
            decode_worker="d", address=served.address, token=promise.token, transport=transport, lease_s=0.06
        )
        parcel = Parcel(manifest=shipment.manifest(), body=sender.view(sender.slot), slot=sender.slot)
        async with kv_sender.keep_alive(ticket):
            await asyncio.sleep(0.05)
            report = await kv_sender.send(parcel, ticket)
        assert (report.transport, report.sent_bytes > len(shipment.body)) == (transport, True)
        await kv_sender.close()
        await answers(served, promise.token, shipment)

    run_with_arena(loaded, shipment, body)
