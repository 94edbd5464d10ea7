"""A router with an HTTP port in front of scripted workers, and a client of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from tests.unit.router.fakes import Bench, FakeDecode, FakePrefill, bench

CHAT = "/v1/chat/completions"
PNG_URI = "data:image/png;base64," + base64.b64encode(b"png").decode()


def chat(text: str = "what is it?", *, images: int = 0, **fields: Any) -> dict[str, Any]:
    """A request with one message."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": PNG_URI}} for _ in range(images)]
    content = [*parts, {"type": "text", "text": text}] if images else text
    return {"messages": [{"role": "user", "content": content}], **fields}


class Served:
    """The workers and the router, and a client."""

    def __init__(self, b: Bench, client: httpx.AsyncClient) -> None:
        self.bench, self.client = b, client
        self.prefill, self.decode = b.prefill[0], b.decode[0]

    async def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """The response to a request."""
        return await self.client.post(CHAT, json=chat(**fields), headers=headers)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection for what no client would send."""
        host, _, port = self.bench.router.http_address.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def say(self, sent: bytes) -> bytes:
        """What comes back first over a new connection; nothing where it is closed."""
        reader, writer = await self.connect()
        try:
            writer.write(sent)
            return await asyncio.wait_for(reader.read(4096), 10)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def asking(self, **fields: Any) -> AsyncIterator[httpx.Response]:
        """A stream that is read while open."""
        async with self.client.stream("POST", CHAT, json=chat(**{"stream": True, **fields})) as response:
            yield response


@contextlib.asynccontextmanager
async def served(
    prefill: list[FakePrefill] | None = None, decode: list[FakeDecode] | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """Checks at the end that nothing is left on any worker."""
    async with bench(prefill, decode, **{"http_port": 0, **settings}) as b:
        url = f"http://{b.router.http_address}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            yield Served(b, client)


async def until(condition: Callable[[], bool]) -> None:
    """Looks again and again, for what nobody is told of."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def events_of(text: str) -> list[Any]:
    """The content of server-sent events, `[DONE]` as it is."""
    pieces = text.split("\n\n")
    assert pieces.pop() == ""
    assert all(piece.startswith("data: ") for piece in pieces)
    contents = [piece.removeprefix("data: ") for piece in pieces]
    return [content if content == "[DONE]" else json.loads(content) for content in contents]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Its error object."""
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return error
