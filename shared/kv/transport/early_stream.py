"""A gRPC transfer that begins while the parcel is being made: an opening, chunks, and a trailer that says what it was.

Only over gRPC: through shared memory a parcel is written where it will be read, and nothing would leave earlier.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import NamedTuple

import grpc
from vlcache.worker.v1 import kv_pb2 as pb

from shared.kv.manifest import Manifest
from shared.kv.transport.base import SendReport
from shared.kv.transport.frames import CHUNK_BYTES, encode_chunk, encode_opening, encode_trailer
from shared.kv.transport.grpc_stream import PUT_METHOD, GrpcTransport
from shared.rpc.first_status import FirstStatus
from shared.rpc.status import from_rpc_error
from shared.threads import run_to_end

Piece = Callable[[], memoryview]
"""Waits until some bytes are there and returns them; called in a thread."""


class _Open(NamedTuple):
    call: grpc.aio.StreamUnaryCall
    status: FirstStatus
    sending: asyncio.Task[None]


class EarlyStream:
    """One parcel on its way to one decode worker. Lives on the event loop; `add` and `placed` may be called elsewhere.

    Without a piece nothing is opened. Whoever made it closes it, whatever came of it.

    Args:
        channel: To the decode worker.
        token: The reservation's secret.
        thread: Where pieces are waited for.

    Attributes:
        begun: Whether something has left, and the rest must follow it.
        waves: Of each row, when all are known.
    """

    def __init__(self, channel: grpc.aio.Channel, token: bytes, thread: Executor) -> None:
        self._put = channel.stream_unary(PUT_METHOD, response_deserializer=pb.PutKVResponse.FromString)
        self._token = token
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | Manifest] = asyncio.Queue()
        self._open: _Open | None = None
        self._sent_bytes = 0
        self.waves = b""
        self.begun = False

    def add(self, piece: Piece) -> None:
        """Sends the next wave as soon as it is there."""
        self.begun = True
        self._loop.call_soon_threadsafe(self._enqueue, piece)

    def placed(self, waves: bytes) -> None:
        """Says which rows the waves were, as in `shared/kv/waves.py`; the first one has number 0."""
        self.waves = waves

    async def finish(self, manifest: Manifest, rest: Iterable[Piece]) -> SendReport:
        """Sends what has not left yet, and what the parcel is; returns when it is installed.

        Args:
            rest: What follows the waves that were added; not touched any more when this returns or raises.

        Returns:
            The bytes of all that was sent, and the time since the parcel was complete.

        Raises:
            ServiceError: The decode worker refused, or cannot be reached.
        """
        # what was added is in the queue then
        await asyncio.sleep(0)
        assert self._open is not None, "nothing left early"
        started = time.monotonic()
        for piece in rest:
            self._pieces.put_nowait(piece)
        self._pieces.put_nowait(manifest)
        try:
            await asyncio.wait([self._open.sending])
            if not self._open.sending.cancelled():
                self._open.sending.result()
            await self._open.call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(self._open.status.of(error)) from error
        finally:
            await self.close()
        return SendReport(transport=GrpcTransport.name, sent_bytes=self._sent_bytes, seconds=time.monotonic() - started)

    async def close(self) -> None:
        """Breaks off what is not finished; no piece is touched any more."""
        if self._open is not None:
            self._open.call.cancel()
            self._open.sending.cancel()
            await asyncio.gather(self._open.sending, return_exceptions=True)

    def _enqueue(self, piece: Piece) -> None:
        if self._open is None:
            call = self._put()
            self._open = _Open(call, FirstStatus(call), asyncio.create_task(self._send(call)))
        self._pieces.put_nowait(piece)

    async def _send(self, call: grpc.aio.StreamUnaryCall) -> None:
        """Ends where the call does, which knows why."""
        try:
            await self._write(call, encode_opening(self._token))
            offset = 0
            while not isinstance(piece := await self._pieces.get(), Manifest):
                data = await run_to_end(self._thread, piece)
                for at in range(0, len(data), CHUNK_BYTES):
                    await self._write(call, encode_chunk(offset + at, data[at : at + CHUNK_BYTES]))
                offset += len(data)
            await self._write(call, encode_trailer(piece.to_proto()))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return

    async def _write(self, call: grpc.aio.StreamUnaryCall, frame: bytes) -> None:
        await call.write(frame)
        self._sent_bytes += len(frame)
