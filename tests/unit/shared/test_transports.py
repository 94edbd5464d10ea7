"""Parcels over gRPC chunks and over shared memory, to a scripted receiver over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator

import grpc
import pytest
from vlcache.worker.v1 import kv_pb2 as pb

from shared import errors
from shared.kv.arena import Arena
from shared.kv.manifest import Manifest
from shared.kv.transport.base import ParcelTransport
from shared.kv.transport.frames import CHUNK_BYTES
from shared.kv.transport.grpc_stream import GrpcTransport
from shared.kv.transport.memory import MemoryTransport
from tests.unit.shared.parcels import parcel_in
from tests.unit.shared.receiver import SERVICE, Receiver
from tests.unit.shared.scripted import run, serving

TOKEN = b"secret of the reservation"
MAKERS: dict[str, Callable[[grpc.aio.Channel], ParcelTransport]] = {
    "grpc": GrpcTransport,
    "memory": lambda channel: MemoryTransport(channel, "epoch-1"),
}


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(4 * CHUNK_BYTES)
    yield made
    made.close()


@pytest.mark.parametrize("nbytes", [256, CHUNK_BYTES - 64, CHUNK_BYTES, CHUNK_BYTES + 64, 3 * CHUNK_BYTES + 4096])
def test_a_stream_brings_the_whole_body_in_order_and_counts_its_bytes(arena: Arena, nbytes: int) -> None:
    async def main() -> None:
        receiver, parcel = Receiver(), parcel_in(arena, nbytes)
        async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
            report = await GrpcTransport(channel).send(parcel, TOKEN)
        assert receiver.header is not None
        assert receiver.header.token == TOKEN
        assert Manifest.from_proto(receiver.header.manifest) == parcel.manifest
        assert receiver.body == parcel.body
        sizes = [len(chunk.data) for chunk in receiver.chunks]
        assert [chunk.offset for chunk in receiver.chunks] == [sum(sizes[:index]) for index in range(len(sizes))]
        assert all(size == CHUNK_BYTES for size in sizes[:-1])
        assert len(sizes) == -(-nbytes // CHUNK_BYTES)
        assert report.sent_bytes == sum(map(len, receiver.frames))
        assert report.transport == "grpc"
        assert report.seconds > 0

    run(main)


def test_shared_memory_sends_only_a_descriptor_and_counts_the_body_too(arena: Arena) -> None:
    async def main() -> None:
        arena.allocate(640)
        receiver, parcel = Receiver(), parcel_in(arena, 1024)
        async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
            report = await MemoryTransport(channel, "epoch-1").send(parcel, TOKEN)
        (wire,) = receiver.installs
        request = pb.InstallKVRequest.FromString(wire)
        assert request.token == TOKEN
        assert Manifest.from_proto(request.manifest) == parcel.manifest
        assert request.slot == pb.ArenaSlot(arena="epoch-1", offset=640, nbytes=1024)
        assert len(wire) < 1024
        assert report.sent_bytes == 1024 + len(wire)
        assert report.transport == "memory"

    run(main)


def test_a_transport_can_send_again_and_at_the_same_time(arena: Arena) -> None:
    async def main() -> None:
        parcels = [parcel_in(arena, CHUNK_BYTES + 64, seed) for seed in range(2)]
        receiver = Receiver()
        async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
            transport = MAKERS["memory"](channel)
            await asyncio.gather(*(transport.send(parcel, TOKEN) for parcel in parcels))
        assert len(receiver.installs) == 2
        for parcel in parcels:
            receiver = Receiver()
            async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
                await GrpcTransport(channel).send(parcel, TOKEN)
            assert receiver.body == parcel.body

    run(main)


REFUSALS = [
    errors.DataLossError("digest", reason="PARCEL_DIGEST"),
    errors.FailedPreconditionError("other model", reason="INCOMPATIBLE_PARCEL"),
    errors.NotFoundError("no reservation"),
    errors.ResourceExhaustedError("full", retry_after_s=2.0),
    errors.AbortedError("released"),
]


@pytest.mark.parametrize("transport", MAKERS)
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: error.code)
def test_a_refusal_is_the_receivers_error(arena: Arena, transport: str, refusal: errors.ServiceError) -> None:
    async def main() -> None:
        receiver = Receiver(error=refusal)
        async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
            with pytest.raises(type(refusal)) as caught:
                await MAKERS[transport](channel).send(parcel_in(arena, 2 * CHUNK_BYTES), TOKEN)
        assert caught.value.reason == refusal.reason
        assert caught.value.message == refusal.message
        assert caught.value.retry_after_s == refusal.retry_after_s

    run(main)


@pytest.mark.parametrize("fail_after", [1, 2, 4])
def test_a_refusal_in_the_middle_of_a_stream_ends_it(arena: Arena, fail_after: int) -> None:
    async def main() -> None:
        receiver = Receiver(error=errors.DataLossError("chunk", reason="CHUNK_CHECKSUM"), fail_after=fail_after)
        async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
            with pytest.raises(errors.DataLossError) as caught:
                await GrpcTransport(channel).send(parcel_in(arena, 4 * CHUNK_BYTES), TOKEN)
        assert caught.value.reason == "CHUNK_CHECKSUM"
        assert len(receiver.frames) == fail_after

    run(main)


def test_a_refusal_is_not_lost_when_a_write_fails_at_the_same_moment(arena: Arena) -> None:
    """grpcio would report about one in a hundred as an internal error."""

    async def main() -> None:
        parcel, seen = parcel_in(arena, 4 * CHUNK_BYTES), set()
        for attempt in range(50):
            receiver = Receiver(error=errors.NotFoundError("no reservation"), fail_after=attempt % 5)
            async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
                try:
                    await GrpcTransport(channel).send(parcel, TOKEN)
                except errors.ServiceError as error:
                    seen.add(type(error))
        assert seen == {errors.NotFoundError}

    run(main)


class TwoStatuses:
    """A call of grpcio in that moment: it gets one status, then another that replaces it."""

    def __init__(self, first: grpc.StatusCode, second: grpc.StatusCode) -> None:
        self._code, self._second = first, second
        self._callbacks: list[Callable[[TwoStatuses], None]] = []

    def add_done_callback(self, callback: Callable[[TwoStatuses], None]) -> None:
        self._callbacks.append(callback)

    async def code(self) -> grpc.StatusCode:
        return self._code

    async def details(self) -> str:
        return f"details of {self._code.name}"

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        return grpc.aio.Metadata()

    def __await__(self) -> Generator[None, None, None]:
        for callback in self._callbacks:
            callback(self)
        self._code = self._second
        yield
        details = f"details of {self._code.name}"
        raise grpc.aio.AioRpcError(self._code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


class TwoStatusesChannel:
    """A channel whose calls fail with one status and then another."""

    def __init__(self, first: str, second: str) -> None:
        self._statuses = grpc.StatusCode[first], grpc.StatusCode[second]

    def stream_unary(self, path: str, response_deserializer: object) -> Callable[[object], TwoStatuses]:
        return lambda frames: TwoStatuses(*self._statuses)


@pytest.mark.parametrize(
    ("first", "second", "true"),
    [
        ("DATA_LOSS", "INTERNAL", errors.DataLossError),
        ("INTERNAL", "DATA_LOSS", errors.DataLossError),
        ("INTERNAL", "INTERNAL", errors.InternalError),
        ("NOT_FOUND", "NOT_FOUND", errors.NotFoundError),
        ("OK", "INTERNAL", errors.InternalError),
    ],
)
def test_the_true_status_of_a_call_is_kept(arena: Arena, first: str, second: str, true: type[Exception]) -> None:
    async def main() -> None:
        with pytest.raises(true) as caught:
            await GrpcTransport(TwoStatusesChannel(first, second)).send(parcel_in(arena, 256), TOKEN)
        assert type(caught.value) is true
        assert caught.value.message == f"details of {caught.value.code}"

    run(main)


@pytest.mark.parametrize("transport", MAKERS)
def test_a_bug_of_the_receiver_is_internal(arena: Arena, transport: str) -> None:
    async def main() -> None:
        receiver = Receiver(error=ZeroDivisionError("secret"))
        async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
            with pytest.raises(errors.InternalError) as caught:
                await MAKERS[transport](channel).send(parcel_in(arena, 256), TOKEN)
        assert "secret" not in caught.value.message

    run(main)


@pytest.mark.parametrize("transport", MAKERS)
def test_a_receiver_that_is_gone_is_unavailable(arena: Arena, transport: str) -> None:
    async def main() -> None:
        async with serving(Receiver().handlers(), service=SERVICE) as (server, channel):
            await server.stop(0)
            with pytest.raises(errors.UnavailableError) as caught:
                await MAKERS[transport](channel).send(parcel_in(arena, 256), TOKEN)
        assert "127.0.0.1" not in caught.value.message

    run(main)


@pytest.mark.parametrize("transport", MAKERS)
def test_a_receiver_that_dies_in_the_middle_is_a_service_error(arena: Arena, transport: str) -> None:
    async def main() -> None:
        receiver = Receiver(hold=True)
        async with serving(receiver.handlers(), service=SERVICE) as (server, channel):
            sending = asyncio.create_task(MAKERS[transport](channel).send(parcel_in(arena, CHUNK_BYTES), TOKEN))
            await receiver.begun.wait()
            await server.stop(0)
            with pytest.raises(errors.ServiceError) as caught:
                await sending
        assert caught.value.code in ("UNAVAILABLE", "CANCELLED")

    run(main)


@pytest.mark.parametrize("transport", MAKERS)
def test_a_cancelled_transfer_ends_at_the_receiver_too(arena: Arena, transport: str) -> None:
    async def main() -> None:
        receiver = Receiver(hold=True)
        async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
            sending = asyncio.create_task(MAKERS[transport](channel).send(parcel_in(arena, 4 * CHUNK_BYTES), TOKEN))
            await receiver.begun.wait()
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            await receiver.has_ended.wait()
        assert receiver.ended is asyncio.CancelledError

    run(main)
