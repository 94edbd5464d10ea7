"""A slower way to a server on the same machine: what clients send passes a token bucket, answers come back at once."""

from __future__ import annotations

import asyncio
import time

# Small beside what a link carries in a millisecond, and what the bucket holds.
READ_BYTES = 1 << 16


class SlowLink:
    """Listens beside a server, for clients that are to reach it slowly.

    Args:
        port: The server's, on 127.0.0.1.
        bytes_per_s: What passes from all clients together.
    """

    def __init__(self, port: int, bytes_per_s: float) -> None:
        self._port = port
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Where it listens."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=READ_BYTES)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def stop(self) -> None:
        """Leaves all clients and takes no more."""
        assert self._server is not None
        self._server.close()
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients)
        await self._server.wait_closed()

    async def _serve(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)
        answers, server = await asyncio.open_connection("127.0.0.1", self._port, limit=READ_BYTES)
        try:
            await asyncio.gather(self._pass(client, server, slowly=True), self._pass(answers, back, slowly=False))
        except (OSError, asyncio.CancelledError):
            return  # one end was closed
        finally:
            server.close()
            back.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slowly: bool) -> None:
        while data := await reader.read(READ_BYTES):
            if slowly:
                await self._wait(len(data))
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def _wait(self, nbytes: int) -> None:
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + nbytes / self._bytes_per_s
        await asyncio.sleep(self._free_at - now)
