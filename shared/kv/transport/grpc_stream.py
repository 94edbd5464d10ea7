"""The gRPC transport: a client stream of 1.5 MiB chunks. Works everywhere; the default across hosts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc
from vlcache.worker.v1 import kv_pb2 as pb

from shared.kv.transport.base import Parcel, SendReport
from shared.kv.transport.frames import CHUNK_BYTES, encode_chunk, encode_header
from shared.rpc.first_status import FirstStatus
from shared.rpc.status import from_rpc_error

PUT_METHOD = "/vlcache.worker.v1.KVTransferService/PutKV"


class GrpcTransport:
    """Streams parcels over one channel to one decode worker. Back-pressure is gRPC's own flow control."""

    name = "grpc"

    def __init__(self, channel: grpc.aio.Channel) -> None:
        # no serializer: the frames are wire bytes already
        self._put = channel.stream_unary(PUT_METHOD, response_deserializer=pb.PutKVResponse.FromString)

    async def send(self, parcel: Parcel, token: bytes) -> SendReport:
        """See `ParcelTransport.send`."""
        started = time.monotonic()
        counter = _Counter()
        call = self._put(counter.frames(parcel, token))
        status = FirstStatus(call)
        try:
            await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(status.of(error)) from error
        return SendReport(transport=self.name, sent_bytes=counter.sent_bytes, seconds=time.monotonic() - started)


class _Counter:
    """Makes the frames of one transfer and counts their bytes."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    async def frames(self, parcel: Parcel, token: bytes) -> AsyncIterator[bytes]:
        yield self._counted(encode_header(token, parcel.manifest.to_proto()))
        for offset in range(0, len(parcel.body), CHUNK_BYTES):
            yield self._counted(encode_chunk(offset, parcel.body[offset : offset + CHUNK_BYTES]))

    def _counted(self, frame: bytes) -> bytes:
        self.sent_bytes += len(frame)
        return frame
