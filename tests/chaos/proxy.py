"""A TCP proxy that can cut its connections and damage what passes."""

from __future__ import annotations

import asyncio
import contextlib

READ_BYTES = 1 << 16
# Calls of routers are far smaller, chunks of parcels far larger.
LARGE_BYTES = 1 << 13


class Proxy:
    """Use as a context manager, in front of one server."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.flips = 0
        """Bits still to be flipped, one in each large piece on its way to the server."""

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> int:
        """Resets every connection; new ones are let through. How many there were."""
        writers = list(self._writers)
        for writer in writers:
            writer.transport.abort()
        return len(writers) // 2

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            to_reader, to_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, to_writer}
        self._writers |= pair
        try:
            await asyncio.gather(self._pump(reader, to_writer, damage=True), self._pump(to_reader, writer))
        finally:
            self._writers -= pair
            for each in pair:
                each.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, damage: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(READ_BYTES):
                sink.write(self._damaged(data) if damage else data)
                await sink.drain()
        sink.transport.abort()

    def _damaged(self, data: bytes) -> bytes:
        if not self.flips or len(data) < LARGE_BYTES:
            return data
        self.flips -= 1
        middle = len(data) // 2
        return data[:middle] + bytes((data[middle] ^ 0x10,)) + data[middle + 1 :]
