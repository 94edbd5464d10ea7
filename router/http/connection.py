"""One connection of a client, with limits that uvicorn's own has none of."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# A request's line and headers.
MAX_HEAD_BYTES = 64 << 10
HEAD_TIMEOUT_S = 10.0
# Without a byte taken from what is to be written.
STALL_TIMEOUT_S = 120.0


class LimitedConnection(HttpToolsProtocol):
    """Ends where the head of a request is too large or too slow to come, or nobody reads what is answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._stalled: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = self._abort_after(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._go_on()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # what came with the end of a head is its body's
        if self._late is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._late is None:
            self._late = self._abort_after(HEAD_TIMEOUT_S)

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self._abort_after(STALL_TIMEOUT_S)

    def resume_writing(self) -> None:
        self._go_on()
        super().resume_writing()

    def _head_came(self) -> None:
        self._head_bytes = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _go_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _abort_after(self, seconds: float) -> Any:
        return self.loop.call_later(seconds, self.transport.abort)
