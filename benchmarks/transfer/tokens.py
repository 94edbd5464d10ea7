"""Token streams as a decode worker sends them, and how late they arrive."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
import time
from collections.abc import AsyncIterator

import grpc

from benchmarks.transfer.methods import TOKENS

STREAMS = 8
TOKENS_PER_S = 30
_DUE = struct.Struct("<d")


class TokenSource:
    """Makes tokens in a thread, as decode steps do, and sends them on the event loop, as long as someone reads.

    A token is the moment at which it was due (CLOCK_MONOTONIC, the same in all processes). The streams take turns:
    with 8 of 30 tokens/s, some token is due every 4.2 ms.
    """

    def __init__(self) -> None:
        self._streams: list[asyncio.Queue[float]] = []

    async def stream(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """One server stream, for ever."""
        queue: asyncio.Queue[float] = asyncio.Queue()
        self._streams.append(queue)
        if len(self._streams) == 1:
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._make, args=(loop,), name="step", daemon=True).start()
        try:
            while True:
                yield _DUE.pack(await queue.get())
        finally:
            self._streams.remove(queue)

    def _make(self, loop: asyncio.AbstractEventLoop) -> None:
        due, turn = time.monotonic(), 0
        while self._streams:
            due += 1 / (STREAMS * TOKENS_PER_S)
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the process with it
                loop.call_soon_threadsafe(self._send, turn % STREAMS, due)
            turn += 1

    def _send(self, stream: int, due: float) -> None:
        if stream < len(self._streams):
            self._streams[stream].put_nowait(due)


class TokenReader:
    """Reads all streams and notes how late every token is. Use as a context manager."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._lateness: list[float] = []
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> TokenReader:
        calls = [self._channel.unary_stream(TOKENS)(b"") for _ in range(STREAMS)]
        await asyncio.gather(*(call.wait_for_connection() for call in calls))
        self._readers = [asyncio.create_task(self._read(call)) for call in calls]
        return self

    async def __aexit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await self._channel.close()

    def take(self) -> list[float]:
        """Seconds that each token since the last call was late."""
        taken, self._lateness = self._lateness, []
        return taken

    async def _read(self, tokens: AsyncIterator[bytes]) -> None:
        async for message in tokens:
            self._lateness.append(time.monotonic() - _DUE.unpack(message)[0])
