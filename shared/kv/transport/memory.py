"""The shared-memory transport: the parcel stays in the arena, only its descriptor travels (one unary call)."""

from __future__ import annotations

import time

import grpc
from vlcache.worker.v1 import kv_pb2 as pb
from vlcache.worker.v1 import kv_pb2_grpc

from shared.kv.transport.base import Parcel, SendReport
from shared.rpc.status import from_rpc_error


class MemoryTransport:
    """Announces slots of one arena to one decode worker that has mapped it."""

    name = "memory"

    def __init__(self, channel: grpc.aio.Channel, epoch: str) -> None:
        self._stub = kv_pb2_grpc.KVTransferServiceStub(channel)
        self._epoch = epoch

    async def send(self, parcel: Parcel, token: bytes) -> SendReport:
        """See `ParcelTransport.send`."""
        started = time.monotonic()
        slot = pb.ArenaSlot(
            arena=self._epoch,
            offset=parcel.slot.extent.offset,
            nbytes=len(parcel.body),
        )
        request = pb.InstallKVRequest(token=token, manifest=parcel.manifest.to_proto(), slot=slot)
        try:
            await self._stub.InstallKV(request)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        sent_bytes = len(parcel.body) + request.ByteSize()
        return SendReport(transport=self.name, sent_bytes=sent_bytes, seconds=time.monotonic() - started)
