"""A scripted decode worker's data plane: takes parcels as `decode_worker/kv_receiver.py` does, and counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from vlcache.worker.v1 import kv_pb2 as pb

from shared.kv.transport.frames import Chunk, decode_chunk, decode_first

SERVICE = "vlcache.worker.v1.KVTransferService"


class Receiver:
    """Keeps what arrived. Before message `fail_after` is read it raises `error`, if there is one.

    With `hold`, it stops reading after the header until `release` is set.
    """

    def __init__(self, *, error: Exception | None = None, fail_after: int = 0, hold: bool = False) -> None:
        self._error, self._fail_after = error, fail_after
        self.frames: list[bytes] = []
        self.header: pb.PutKVHeader | None = None
        self.chunks: list[Chunk] = []
        self.installs: list[bytes] = []
        self.begun, self.release = asyncio.Event(), asyncio.Event()
        self.ended: type[BaseException] | None = None
        self.has_ended = asyncio.Event()
        if not hold:
            self.release.set()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            "PutKV": grpc.stream_unary_rpc_method_handler(
                self.put, response_serializer=pb.PutKVResponse.SerializeToString
            ),
            "InstallKV": grpc.unary_unary_rpc_method_handler(self.install),
        }

    @property
    def body(self) -> bytes:
        return b"".join(bytes(chunk.data) for chunk in self.chunks)

    async def put(self, frames: AsyncIterator[bytes], context: Any) -> pb.PutKVResponse:
        try:
            if self._error and self._fail_after == 0:
                raise self._error
            async for frame in frames:
                self._take(frame)
                if self._error and len(self.frames) == self._fail_after:
                    raise self._error
                self.begun.set()
                await self.release.wait()
            return pb.PutKVResponse(received_bytes=len(self.body))
        except BaseException as error:
            self.ended = type(error)
            raise
        finally:
            self.has_ended.set()

    def _take(self, frame: bytes) -> None:
        self.frames.append(frame)
        if self.header is None:
            first = decode_first(frame)
            assert isinstance(first, pb.PutKVHeader)
            self.header = first
        else:
            self.chunks.append(decode_chunk(frame))

    async def install(self, request: bytes, context: Any) -> bytes:
        self.installs.append(request)
        self.begun.set()
        try:
            await self.release.wait()
            if self._error:
                raise self._error
            return pb.InstallKVResponse().SerializeToString()
        except BaseException as error:
            self.ended = type(error)
            raise
        finally:
            self.has_ended.set()
