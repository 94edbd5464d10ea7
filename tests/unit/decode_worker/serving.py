"""A whole decode worker behind real gRPC, and clients that play the router and the prefill worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc
from vlcache.worker.v1 import decode_pb2 as pb
from vlcache.worker.v1 import decode_pb2_grpc, kv_pb2_grpc, worker_pb2

from decode_worker.answers import Stage
from decode_worker.config import DecodeConfig
from decode_worker.worker import DecodeWorker, LoadedModel, build_engine
from shared.errors import ServiceError
from shared.kv.manifest import Manifest
from shared.kv.transport.frames import encode_chunk, encode_header
from shared.kv.transport.grpc_stream import PUT_METHOD
from shared.rpc.first_status import FirstStatus
from shared.rpc.server import RpcServer
from shared.rpc.status import from_rpc_error
from tests.tasks import check_none_is_left

TIMEOUT_S = 120.0
BuildEngine = Callable[[DecodeConfig, LoadedModel], tuple[Any, Any]]
EPOCH = "prefill"


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 - other tasks and threads change it
        await asyncio.sleep(0.005)


class TokenStream:
    """One `StreamTokens` call; updates by handle."""

    def __init__(self, stub: Any) -> None:
        self._call = stub.StreamTokens()
        self.messages: list[pb.TokenStreamResponse] = []
        self._reader = asyncio.create_task(self._read())
        self._one_writes = asyncio.Lock()

    async def attach(self, handle: int, token: bytes, delivered: Sequence[int] = (), choice: int = 0) -> None:
        attach = pb.Attach(handle=handle, token=token, delivered=delivered, choice=choice)
        await self.write(pb.TokenStreamRequest(attach=attach))

    async def cancel(self, handle: int) -> None:
        await self.write(pb.TokenStreamRequest(cancel=pb.Cancel(handle=handle)))

    async def write(self, command: pb.TokenStreamRequest) -> None:
        async with self._one_writes:
            await self._call.write(command)

    def updates(self, handle: int) -> list[pb.SequenceUpdate]:
        return [update for message in self.messages for update in message.updates if update.handle == handle]

    async def finished(self, handle: int) -> list[pb.SequenceUpdate]:
        """All updates of a sequence, the last one included."""
        await until(lambda: any(each.finish_reason or each.HasField("error") for each in self.updates(handle)))
        return self.updates(handle)

    async def tokens(self, handle: int) -> list[int]:
        return [token for update in await self.finished(handle) for token in update.token_ids]

    async def text(self, handle: int) -> str:
        return "".join(update.text for update in await self.finished(handle))

    async def close(self) -> None:
        """Breaks the stream."""
        self._call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            async for message in self._call:
                self.messages.append(message)


class Served:
    """The worker and everything a test needs to talk to it."""

    def __init__(self, worker: DecodeWorker, channel: grpc.aio.Channel, address: str) -> None:
        self.worker, self.address = worker, address
        self.held = worker._reservations
        self.decode = decode_pb2_grpc.DecodeServiceStub(channel)
        self.transfer = kv_pb2_grpc.KVTransferServiceStub(channel)
        self._put = channel.stream_unary(PUT_METHOD)
        self._streams: list[TokenStream] = []

    async def info(self) -> worker_pb2.WorkerInfo:
        return await self.decode.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())

    async def reserve_request(self, **changes: Any) -> pb.ReserveRequest:
        """`delivered_tokens` are those of answer 0, which alone is asked for."""
        info = await self.info()
        if delivered := changes.pop("delivered_tokens", 0):
            changes["answers"] = [pb.ReservedAnswer(delivered_tokens=delivered)]
        values: dict[str, Any] = {
            "request_id": "r",
            "attempt": 1,
            "compatibility": info.model.compatibility,
            "kept_tokens_bound": 40,
            "max_new_tokens": 8,
            "prefill_epoch": EPOCH,
            "epoch": info.epoch,
        }
        return pb.ReserveRequest(**(values | changes))

    async def reserve(self, **changes: Any) -> pb.ReserveResponse:
        return await self.decode.Reserve(await self.reserve_request(**changes))

    async def put(self, frames: Iterable[bytes]) -> None:
        await self._put(iter(frames))

    def open_put(self) -> Any:
        """A transfer whose frames are written one by one."""
        call = self._put()
        # a sender that still writes when it is refused may hear of it first as INTERNAL
        call.first_status = FirstStatus(call)
        return call

    def stream(self) -> TokenStream:
        self._streams.append(TokenStream(self.decode))
        return self._streams[-1]

    async def close_streams(self) -> None:
        for stream in self._streams:
            await stream.close()

    def held_bytes(self) -> dict[str, int]:
        return {stage.value: held for stage in Stage if (held := self.held.bytes_in(stage))}

    async def nothing_is_held(self) -> None:
        """Waits until every byte is back, which follows the last message by a turn of the step thread."""
        await until(lambda: not self.held_bytes())
        self.worker.runner.check_integrity()
        assert self.held.idle.is_set()
        info = await self.info()
        assert (info.kv.reserved, info.kv.filling, info.kv.active) == (0, 0, 0)


def frames(
    token: bytes, manifest: Manifest, body: Sequence[int] | memoryview | bytearray, chunk: int = 500
) -> list[bytes]:
    """The messages of a transfer."""
    view = memoryview(bytes(body))
    cuts = range(0, len(view), chunk)
    return [encode_header(token, manifest.to_proto()), *(encode_chunk(at, view[at : at + chunk]) for at in cuts)]


def flipped(frame: bytes) -> bytes:
    """With one bit changed on the way."""
    return frame[:-1] + bytes((frame[-1] ^ 1,))


async def failure(call: Awaitable[Any]) -> ServiceError:
    """The error that a call ends with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        first = getattr(call, "first_status", None)
        return from_rpc_error(first.of(error) if first else error)
    raise AssertionError("the call succeeded")


@contextlib.asynccontextmanager
async def serving(loaded: LoadedModel, *, build: BuildEngine = build_engine, **settings: Any) -> AsyncIterator[Served]:
    config = DecodeConfig(model="tiny", **({"kv_memory_mib": 1} | settings))
    pool, engine = build(config, loaded)
    worker = DecodeWorker(config, loaded, pool, getattr(loaded, "engine", engine))
    server = await RpcServer.start(name="d", host="127.0.0.1", port=0, register=worker.register, services=[])
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            served = Served(worker, channel, server.address)
            yield served
            await served.close_streams()
            await worker.drain(0)
            await served.nothing_is_held()
    finally:
        await server.stop(0)
        await worker.close()


def run(
    loaded: LoadedModel,
    body: Callable[[Served], Awaitable[None]],
    *,
    timeout_s: float | None = TIMEOUT_S,
    **settings: Any,
) -> None:
    """Runs a test against a fresh worker; afterwards nothing may be held and no task may be left."""

    async def main() -> None:
        async with serving(loaded, **settings) as served:
            await asyncio.wait_for(body(served), timeout_s)
        await check_none_is_left()

    asyncio.run(main())
