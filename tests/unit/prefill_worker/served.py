"""A whole prefill worker behind real gRPC, and scripted decode workers that only take parcels."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, kv_pb2_grpc, prefill_pb2_grpc, worker_pb2
from vlcache.worker.v1 import prefill_pb2 as pb

from decode_worker.arena_directory import ArenaDirectory
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import LoadedModel, PrefillWorker
from shared.errors import NotFoundError, ServiceError
from shared.kv.manifest import Manifest
from shared.kv.secret import SECRET_BYTES
from shared.kv.transport.frames import CHUNK_BYTES
from shared.rpc.server import RpcServer
from shared.rpc.status import from_rpc_error
from tests.unit.prefill_worker.in_process import preprocessing_in_process
from tests.unit.prefill_worker.prompts import user


class Sink(kv_pb2_grpc.KVTransferServiceServicer, decode_pb2_grpc.DecodeServiceServicer):
    """Takes every parcel, once `taking` is set; before that it refuses as `refusals` say. `lost` ends its promises."""

    def __init__(self) -> None:
        self.parcels: list[tuple[bytes, Manifest, bytes]] = []
        self.refusals: list[Exception] = []
        self.lost = False
        self.renewals = 0
        self.arena_socket = ""
        self.begun, self.taking, self.broken = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.taking.set()

    async def PutKV(self, frames: AsyncIterator[kv_pb2.PutKVRequest], context: Any) -> kv_pb2.PutKVResponse:  # noqa: N802
        received = [frame async for frame in frames]
        header = received[0].header
        assert all(len(frame.chunk.data) <= CHUNK_BYTES for frame in received[1:])
        body = b"".join(frame.chunk.data for frame in received[1:])
        await self._take(header.token, header.manifest, body)
        return kv_pb2.PutKVResponse(received_bytes=len(body))

    async def InstallKV(self, request: kv_pb2.InstallKVRequest, context: Any) -> kv_pb2.InstallKVResponse:  # noqa: N802
        directory = ArenaDirectory()
        arena = await directory.find(self.arena_socket, request.slot.arena)
        assert arena is not None
        body = bytes(arena.view(request.slot.offset, request.slot.nbytes))
        directory.close()
        await self._take(request.token, request.manifest, body)
        return kv_pb2.InstallKVResponse()

    async def Renew(self, request: Any, context: Any) -> decode_pb2.RenewResponse:  # noqa: N802
        self.renewals += 1
        self._check()
        return decode_pb2.RenewResponse()

    async def _take(self, token: bytes, manifest: kv_pb2.KVManifest, body: bytes) -> None:
        self._check()
        if self.refusals:
            raise self.refusals.pop(0)
        self.begun.set()
        try:
            await self.taking.wait()
        except asyncio.CancelledError:
            self.broken.set()
            raise
        self.parcels.append((token, Manifest.from_proto(manifest), body))

    def _check(self) -> None:
        if self.lost:
            raise NotFoundError("the reservation has ended", reason="NO_RESERVATION")

    def register(self, server: grpc.aio.Server) -> None:
        kv_pb2_grpc.add_KVTransferServiceServicer_to_server(self, server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)


class Stack:
    """The worker, a stub to talk to it, and a sink; more of them come with `decode_worker`."""

    def __init__(self, worker: PrefillWorker, stub: Any, info: Any, servers: contextlib.AsyncExitStack) -> None:
        self.worker, self.stub, self.info = worker, stub, info
        self._servers = servers
        self._addresses: dict[Sink, str] = {}
        self._running: dict[Sink, RpcServer] = {}
        self.sink: Sink

    async def decode_worker(self) -> Sink:
        """Another decode worker."""
        sink = Sink()
        sink.arena_socket = self.info.arena_socket
        server = await RpcServer.start(name="d", host="127.0.0.1", port=0, register=sink.register, services=[])
        self._servers.push_async_callback(server.stop, 0)
        self._addresses[sink], self._running[sink] = server.address, server
        return sink

    async def kill(self, sink: Sink) -> None:
        await self._running[sink].stop(0)

    def ticket(self, sink: Sink, **changes: Any) -> pb.Ticket:
        values = {"decode_worker": "d", "token": b"t" * 16, "transport": "grpc", "lease_s": 30}
        return pb.Ticket(decode_address=self._addresses[sink], **(values | changes))

    def request(self, *parts: str | bytes, **changes: Any) -> pb.PrefillRequest:
        sampling = public.SamplingParams(max_new_tokens=8, ignore_eos=True)
        message = public.GenerateRequest(request_id="r", messages=[user(*parts)], sampling=sampling)
        values = {
            "request": message,
            "attempt": 1,
            "ticket": self.ticket(self.sink),
            "epoch": self.info.epoch,
            "parcel": secrets.token_bytes(SECRET_BYTES),
        }
        return pb.PrefillRequest(**(values | changes))

    async def prefill(self, request: pb.PrefillRequest) -> list[pb.PrefillEvent]:
        return [event async for event in self.stub.Prefill(request)]

    async def retained(self, *parts: str | bytes, **changes: Any) -> bytes:
        """Has a prompt computed; the secret of its parcel."""
        request = self.request(*parts, **changes)
        assert any(event.HasField("retained") for event in await self.prefill(request))
        return request.parcel

    async def resend(self, parcel: bytes, sink: Sink, *, attempt: int = 2, **ticket: Any) -> public.Transfer:
        request = pb.ResendRequest(parcel=parcel, attempt=attempt, ticket=self.ticket(sink, **ticket))
        return (await self.stub.Resend(request)).transfer

    async def release(self, *parcels: bytes) -> None:
        await self.stub.ReleaseParcels(pb.ReleaseParcelsRequest(parcels=parcels))

    async def gone(self, *parcels: bytes) -> list[bytes]:
        """Renews, and says what is gone."""
        return list((await self.stub.RenewParcels(pb.RenewParcelsRequest(parcels=parcels))).gone)

    async def kv(self) -> public.KVBytes:
        return (await self.stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())).kv

    def nothing_is_held(self) -> None:
        self.worker.runner.check_integrity()
        kv = self.worker.info().kv
        assert (kv.filling, kv.retained) == (0, 0)


async def failure(call: Awaitable[Any]) -> ServiceError:
    """The error that a call ends with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the call succeeded")


def run(
    loaded: LoadedModel, body: Callable[[Stack], Awaitable[None]], *, timeout_s: float | None = 20, **settings: Any
) -> None:
    """Runs a test against a fresh worker named p."""

    async def main(sockets: Path) -> None:
        values = {"arena_mib": 1, "socket_dir": sockets, "max_images": 2}
        with preprocessing_in_process():
            worker = PrefillWorker(PrefillConfig(model="tiny", **(values | settings)), loaded)
        server = await RpcServer.start(name="p", host="127.0.0.1", port=0, register=worker.register, services=[])
        async with contextlib.AsyncExitStack() as servers:
            try:
                async with grpc.aio.insecure_channel(server.address) as channel:
                    stub = prefill_pb2_grpc.PrefillServiceStub(channel)
                    info = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
                    stack = Stack(worker, stub, info, servers)
                    stack.sink = await stack.decode_worker()
                    await asyncio.wait_for(body(stack), timeout_s)
            finally:
                await worker.drain(5)
                await server.stop(0)
                await worker.close()

    # pytest's own folders may be too deep for a socket
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(main(Path(directory)))
