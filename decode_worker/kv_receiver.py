"""The data plane: takes parcels in over gRPC chunks, from shared memory, or from the own process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator

import grpc
from vlcache.worker.v1 import kv_pb2 as pb

from decode_worker.answers import Reservation
from decode_worker.receive_buffers import ReceiveBuffers
from decode_worker.reservations import Reservations
from decode_worker.runner import DecodeRunner
from decode_worker.wave_receiver import receive_waves
from shared.errors import (
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    InvalidRequestError,
    ServiceError,
    at_stage,
)
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest
from shared.kv.transport.frames import decode_chunk, decode_first
from shared.kv.waves import travelling_bound
from shared.telemetry.scope import enter

SERVICE_NAME = "vlcache.worker.v1.KVTransferService"
DISCARD_TIMEOUT_S = 5.0


class KVReceiver:
    """Implements `KVTransferService` and `LocalReceiver`. A parcel is installed whole or not at all."""

    def __init__(self, runner: DecodeRunner, reservations: Reservations, layout: KVLayout) -> None:
        self._runner = runner
        self._reservations = reservations
        self._layout = layout
        self._buffers = ReceiveBuffers()

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service. PutKV gets wire bytes: the frames are read without a copy."""
        handlers = {
            "PutKV": grpc.stream_unary_rpc_method_handler(
                self.put, response_serializer=pb.PutKVResponse.SerializeToString
            ),
            "InstallKV": grpc.unary_unary_rpc_method_handler(
                self.install,
                request_deserializer=pb.InstallKVRequest.FromString,
                response_serializer=pb.InstallKVResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def put(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> pb.PutKVResponse:
        """`PutKV`: a header, then the body in order; or an opening, then rows in waves, then a trailer."""
        try:
            with at_stage("transfer"):
                return pb.PutKVResponse(received_bytes=await self._take(frames))
        except ServiceError:
            await _discard(frames)
            raise

    async def _take(self, frames: AsyncIterator[bytes]) -> int:
        header = decode_first(await anext(aiter(frames), b""))
        if isinstance(header, pb.PutKVOpening):
            return await self._take_waves(frames, header.token)
        manifest = Manifest.from_proto(header.manifest)
        reservation = self._begin(header.token, manifest)
        with self._filling(reservation), self._buffers.borrow(manifest.body_bytes) as buffer:
            received = await _receive(frames, buffer)
            await self._install(reservation, manifest, buffer)
        return received

    async def _take_waves(self, frames: AsyncIterator[bytes], token: bytes) -> int:
        """A parcel whose prefill goes on; only its reservation says how large it may become."""
        reservation = self._reservations.find(token)
        self._begin_fill(reservation)
        bound = travelling_bound(reservation.pool_bytes, self._layout)
        with self._filling(reservation), self._buffers.borrow(bound) as buffer:
            manifest, received = await receive_waves(frames, buffer)
            self._runner.promise.check(reservation, manifest)
            await self._install(reservation, manifest, buffer[:received], in_waves=True)
        return received

    async def install(self, request: pb.InstallKVRequest, context: grpc.aio.ServicerContext) -> pb.InstallKVResponse:
        """`InstallKV`: the body lies in the sender's arena."""
        with at_stage("transfer"):
            manifest = Manifest.from_proto(request.manifest)
            reservation = self._begin(request.token, manifest)
            with self._filling(reservation):
                await self._install(reservation, manifest, _slot_view(reservation, manifest, request.slot))
        return pb.InstallKVResponse()

    async def take(self, token: bytes, manifest: Manifest, body: memoryview) -> None:
        """See `LocalReceiver`."""
        with at_stage("transfer"):
            manifest.check()
            reservation = self._begin(token, manifest)
            with self._filling(reservation):
                await self._install(reservation, manifest, body, verify=False)

    def renew(self, token: bytes) -> None:
        """See `LocalReceiver`."""
        self._reservations.renew(self._reservations.find(token), time.monotonic())

    def grow(self, token: bytes, kept_tokens_bound: int) -> None:
        """See `LocalReceiver`."""
        self._runner.grow(token, kept_tokens_bound)

    def _begin(self, token: bytes, manifest: Manifest) -> Reservation:
        reservation = self._reservations.find(token)
        self._runner.promise.check(reservation, manifest)
        self._begin_fill(reservation)
        return reservation

    def _begin_fill(self, reservation: Reservation) -> None:
        delivery = asyncio.current_task()
        assert delivery is not None
        # every delivery is a task of its own
        enter(reservation.scope)
        self._reservations.begin_fill(reservation, delivery.cancel)

    async def _install(
        self,
        reservation: Reservation,
        manifest: Manifest,
        body: memoryview,
        *,
        verify: bool = True,
        in_waves: bool = False,
    ) -> None:
        with at_stage("install"):
            await self._runner.install(reservation, manifest, body, verify=verify, in_waves=in_waves)

    @contextlib.contextmanager
    def _filling(self, reservation: Reservation) -> Iterator[None]:
        """A delivery that fails leaves the reservation to another one, or to its end.

        Raises:
            AbortedError: The reservation ended meanwhile, and with it the delivery.
        """
        try:
            yield
        except BaseException as error:
            self._reservations.end_fill(reservation)
            if isinstance(error, asyncio.CancelledError) and reservation.ended:
                raise AbortedError("the request was released during its transfer", reason="RELEASED") from None
            raise


async def _receive(frames: AsyncIterator[bytes], buffer: memoryview) -> int:
    """Fills the buffer from chunks that must come in order and without a gap; returns the bytes received."""
    received = 0
    async for message in frames:
        chunk = decode_chunk(message)
        end = received + len(chunk.data)
        if chunk.offset != received or end > len(buffer):
            raise InvalidRequestError("a chunk is out of place", reason="TRANSFER_FRAME")
        buffer[received:end] = chunk.data
        received = end
    if received != len(buffer):
        raise DataLossError(f"the parcel ended after {received} of {len(buffer)} bytes", reason="PARCEL_TRUNCATED")
    return received


async def _discard(frames: AsyncIterator[bytes]) -> None:
    """Lets the sender of a refused parcel finish.

    An aio client that still writes when its call ends reports INTERNAL instead of our status (grpc/grpc#36066).
    """

    async def read() -> None:
        async for _ in frames:
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), DISCARD_TIMEOUT_S)


def _slot_view(reservation: Reservation, manifest: Manifest, slot: pb.ArenaSlot) -> memoryview:
    if reservation.arena is None or slot.arena != reservation.prefill_epoch:
        raise FailedPreconditionError("no arena was agreed on for this transfer", reason="ARENA")
    if slot.nbytes != manifest.body_bytes:
        raise InvalidRequestError("slot and manifest disagree on the size", reason="ARENA_BOUNDS")
    return reservation.arena.view(slot.offset, slot.nbytes)
