"""Leases are kept alive against a scripted decode worker, over real gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, kv_pb2_grpc

from prefill_worker.kv_sender import KVSender, Ticket
from shared.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from shared.kv.arena import Slot
from shared.kv.extents import Extent
from shared.kv.transport.base import Parcel
from shared.rpc.server import RpcServer
from shared.telemetry.metrics import PrefillMetrics
from tests.tasks import check_none_is_left
from tests.unit.prefill_worker.manifests import manifest

PERIOD_S = 0.03


class Decode(decode_pb2_grpc.DecodeServiceServicer, kv_pb2_grpc.KVTransferServiceServicer):
    """Answers renewals with the entries of its script, deliveries with those of `refusals`, and then with yes."""

    def __init__(self, *script: Exception | None) -> None:
        self._script = list(script)
        self.tokens: list[bytes] = []
        self.renewed = asyncio.Event()
        self.refusals: list[Exception] = []
        self.deliveries: list[tuple[bytes, bytes]] = []

    async def Renew(self, request: Any, context: Any) -> decode_pb2.RenewResponse:  # noqa: N802
        self.tokens.append(request.token)
        self.renewed.set()
        answer = self._script.pop(0) if self._script else None
        if answer is not None:
            raise answer
        return decode_pb2.RenewResponse(lease_s=1)

    async def GrowReservation(self, request: Any, context: Any) -> Any:  # noqa: N802
        await asyncio.Event().wait()

    async def PutKV(self, frames: AsyncIterator[kv_pb2.PutKVRequest], context: Any) -> Any:  # noqa: N802
        header, *chunks = [frame async for frame in frames]
        self._deliver(header.header.token, b"".join(each.chunk.data for each in chunks))
        return kv_pb2.PutKVResponse()

    async def InstallKV(self, request: kv_pb2.InstallKVRequest, context: Any) -> Any:  # noqa: N802
        self._deliver(request.token, request.slot.SerializeToString())
        return kv_pb2.InstallKVResponse()

    def register(self, server: Any) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)
        kv_pb2_grpc.add_KVTransferServiceServicer_to_server(self, server)

    def _deliver(self, token: bytes, what: bytes) -> None:
        self.deliveries.append((token, what))
        if self.refusals:
            raise self.refusals.pop(0)

    async def renewals(self, count: int) -> None:
        while len(self.tokens) < count:
            self.renewed.clear()
            await self.renewed.wait()


def ticket(address: str, transport: str = "grpc") -> Ticket:
    return Ticket(decode_worker="d", address=address, token=b"secret", transport=transport, lease_s=6 * PERIOD_S)


@contextlib.asynccontextmanager
async def serving(decode: Decode) -> AsyncIterator[str]:
    server = await RpcServer.start(
        name="d",
        host="127.0.0.1",
        port=0,
        register=decode.register,
        services=[],
    )
    try:
        yield server.address
    finally:
        await server.stop(0)


def run(body: Callable[[KVSender, Decode, Ticket], Awaitable[None]], *script: Exception | None) -> None:
    async def main() -> None:
        metrics = PrefillMetrics(worker="p", model="m")
        decode = Decode(*script)
        async with serving(decode) as address:
            sender = KVSender(epoch="e", metrics=metrics)
            try:
                await asyncio.wait_for(body(sender, decode, ticket(address)), 20)
            finally:
                await sender.close()
        await check_none_is_left()

    asyncio.run(main())


def test_a_lease_is_renewed_until_the_work_is_done() -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        async with sender.keep_alive(promised):
            await decode.renewals(3)
        assert set(decode.tokens) == {b"secret"}
        seen = len(decode.tokens)
        await asyncio.sleep(3 * PERIOD_S)
        assert len(decode.tokens) == seen

    run(body)


def test_a_lost_reservation_ends_its_renewals_and_nothing_else() -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        async with sender.keep_alive(promised):
            await decode.renewals(2)
            # an answer that is late would be asked for again
            await asyncio.sleep(10 * PERIOD_S)
            seen = len(decode.tokens)
            await asyncio.sleep(4 * PERIOD_S)
        assert len(decode.tokens) == seen

    run(body, None, *(NotFoundError("gone") for _ in range(100)))


@pytest.mark.parametrize("hiccup", [UnavailableError("busy"), InvalidRequestError("odd"), RuntimeError("a bug")])
def test_a_hiccup_of_the_decode_worker_is_survived(hiccup: Exception) -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        async with sender.keep_alive(promised):
            await decode.renewals(4)

    run(body, hiccup, hiccup)


def test_a_decode_worker_that_cannot_be_reached_does_not_end_the_work() -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        async with sender.keep_alive(ticket("127.0.0.1:1")):
            await asyncio.sleep(4 * PERIOD_S)

    run(body)


def test_a_cancellation_from_outside_stays_one() -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        async def work() -> None:
            async with sender.keep_alive(promised):
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await decode.renewals(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(body)


def test_an_error_of_the_work_passes_unchanged() -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        with pytest.raises(InvalidRequestError, match="mine"):
            async with sender.keep_alive(promised):
                raise InvalidRequestError("mine")
        with pytest.raises(NotFoundError, match="mine"):
            async with sender.keep_alive(promised):
                raise NotFoundError("mine")

    run(body)


def parcel_of(body: bytes) -> Parcel:
    return Parcel(manifest=manifest(body), body=memoryview(body), slot=Slot(Extent(0, 64), 1))


def count(sender: KVSender, metric: str, **labels: str) -> float:
    metrics = sender._metrics
    return metrics.labelled(getattr(metrics, metric), **labels)._value.get()


@pytest.mark.parametrize("transport", ["grpc", "memory"])
def test_a_parcel_that_was_damaged_on_its_way_is_sent_once_more(transport: str) -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        decode.refusals = [DataLossError("broken", reason="CHUNK_CHECKSUM")]
        report = await sender.send(parcel_of(b"kv" * 128), ticket(promised.address, transport))
        assert report.transport == transport
        assert [attempt[0] for attempt in decode.deliveries] == [b"secret", b"secret"]
        assert decode.deliveries[0] == decode.deliveries[1]
        assert count(sender, "resends", reason="data_loss") == 1
        assert count(sender, "transfer_failures", reason="CHUNK_CHECKSUM") == 1
        assert count(sender, "transfer_bytes", transport=transport) == report.sent_bytes

    run(body)


def test_a_second_damage_is_the_error() -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        decode.refusals = [DataLossError("broken", reason="PARCEL_DIGEST") for _ in range(3)]
        with pytest.raises(DataLossError) as caught:
            await sender.send(parcel_of(b"kv" * 128), promised)
        assert caught.value.reason == "PARCEL_DIGEST"
        assert len(decode.deliveries) == 2

    run(body)


@pytest.mark.parametrize("refusal", [NotFoundError("gone"), InvalidRequestError("odd"), UnavailableError("busy")])
def test_any_other_refusal_is_final(refusal: Exception) -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        decode.refusals = [refusal]
        with pytest.raises(type(refusal)):
            await sender.send(parcel_of(b"kv" * 128), promised)
        assert len(decode.deliveries) == 1
        assert count(sender, "resends", reason="data_loss") == 0

    run(body)


def test_an_unknown_transport_is_refused_and_counted() -> None:
    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        parcel = Parcel(manifest=manifest(), body=memoryview(b""), slot=Slot(Extent(0, 64), 1))
        with pytest.raises(FailedPreconditionError, match="unknown transport 'pigeon'"):
            await sender.send(parcel, ticket(promised.address, "pigeon"))
        failures = sender._metrics.labelled(sender._metrics.transfer_failures, reason="TRANSPORT")
        assert failures._value.get() == 1

    run(body)


def test_a_decode_worker_that_is_late_gives_no_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_worker.kv_sender.GROW_TIMEOUT_S", 0.05)

    async def body(sender: KVSender, decode: Decode, promised: Ticket) -> None:
        assert not await sender.grow(promised, 40)
        assert not await sender.grow(ticket("127.0.0.1:1"), 40)

    run(body)
