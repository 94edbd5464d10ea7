"""The answering half of one HTTP request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import Send

from router.http.completion import DONE, sse
from router.http.errors import body_of, headers_of, status_of
from shared.errors import ServiceError

REQUEST_ID = "x-request-id"
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # a proxy that gathers events would hold back the first ones
    "x-accel-buffering": "no",
}


class Exchange:
    """Writes one response: JSON, or a stream of server-sent events that begins with the first of them.

    Until then an error has a status of its own; after it, it is an event.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._streaming = False
        self.request_id = ""
        """Shown to the client once it is known."""

    async def write(self, event: bytes) -> None:
        """The next event of a stream."""
        if not self._streaming:
            self._streaming = True
            await self._start(200, STREAM_HEADERS)
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def end(self) -> None:
        """The stream is complete."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def reply(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """The whole response."""
        body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        length = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, {**length, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, error: ServiceError) -> None:
        """The request ends in `error`."""
        if not self._streaming:
            return await self.reply(body_of(error), status_of(error), headers_of(error))
        await self.write(sse(body_of(error)))
        await self.write(DONE)
        return await self.end()

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        named = {**headers, REQUEST_ID: self.request_id} if self.request_id else headers
        await self._send({"type": "http.response.start", "status": status, "headers": _raw(named.items())})


def _raw(headers: Iterable[tuple[str, str]]) -> list[Any]:
    return [(name.encode(), value.encode()) for name, value in headers]
