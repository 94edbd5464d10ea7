"""Connections that never get to the point: others are served meanwhile, and they are closed in the end."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shared.rpc import options
from shared.rpc.options import Option, server_options
from tests.certificates import Certificates
from tests.unit.shared.scripted import call, run, serving
from tests.unit.shared.secured import code_of, worker
from tests.unit.shared.test_interceptor import echoing

PATIENCE_S = 15.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, SETTINGS, PING, CONTINUATION = 1, 4, 6, 9
ACK = 1


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


OPENED = PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=ACK)


def dribble(data: bytes) -> Iterator[bytes]:
    """A byte now and then, without end."""
    yield data[:-1]
    while True:
        yield data[-1:]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same options, in less time."""

    def sooner(given: list[Option]) -> list[Option]:
        quick = {
            "grpc.server_handshake_timeout_ms": 700,
            "grpc.keepalive_time_ms": 500,
            "grpc.keepalive_timeout_ms": 500,
            "grpc.http2.ping_timeout_ms": 500,
            "grpc.max_connection_age_ms": 700,
            "grpc.max_connection_age_grace_ms": 700,
        }
        return [(name, quick.get(name, value)) for name, value in given]

    for name in ("LIMIT_OPTIONS", "SERVER_KEEPALIVE_OPTIONS", "PUBLIC_OPTIONS"):
        monkeypatch.setattr(options, name, sooner(getattr(options, name)))


def test_the_limits_are_those_of_every_server() -> None:
    given = dict(server_options())
    times = ("grpc.server_handshake_timeout_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    assert {given[name] for name in times} == {10_000}
    assert given["grpc.max_receive_message_length"] < 5 << 20


SLOW = {
    "says nothing": [b""],
    "does not finish the preface": dribble(PREFACE[:3] + b" "),
    "does not finish a frame's header": [OPENED + b"\0"],
    "sends a header byte by byte": dribble(OPENED + frame(HEADERS, b"\x82", stream=1, length=10_000)),
    "never says that a header is complete": [OPENED + frame(HEADERS, b"\x82", stream=1)],
    "says so in small pieces": [
        OPENED + frame(HEADERS, b"\x82", stream=1),
        *[frame(CONTINUATION, b"\x82", stream=1)] * 400,
    ],
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", SLOW)
def test_slow_connections_are_closed_and_others_are_served(what: str) -> None:
    async def main() -> None:
        async with serving(echoing(), options=options.PUBLIC_OPTIONS) as (server, channel):
            async with connected(server.address) as (reader, writer):
                feeding = asyncio.create_task(feed(writer, SLOW[what]))
                for _ in range(5):
                    assert await call(channel, "UnaryUnary") == [b"request"]
                await closed(reader)
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
            assert await call(channel, "UnaryUnary") == [b"request"]

    run(main)


@pytest.mark.usefixtures("impatient")
def test_a_half_header_cannot_be_kept_alive_by_answers_to_pings() -> None:
    async def main() -> None:
        async with serving(echoing()) as (server, _), connected(server.address) as (reader, writer):
            writer.write(OPENED + frame(HEADERS, b"\x82", stream=1))

            async def answer_pings() -> None:
                while True:
                    head = await reader.readexactly(9)
                    payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                    if head[3] == PING and not head[4] & ACK:
                        writer.write(frame(PING, payload, flags=ACK))

            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await asyncio.wait_for(answer_pings(), PATIENCE_S)

    run(main)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_a_handshake_that_does_not_end_is_ended(tmp_path: Path, sent: bytes) -> None:
    certificates = Certificates(tmp_path)

    async def main() -> None:
        async with (
            worker(certificates.identity("decode")) as address,
            connected(address) as (reader, writer),
        ):
            writer.write(sent)
            assert await code_of(address, certificates.channel("router")) == "OK"
            await closed(reader)

    run(main)


@pytest.mark.usefixtures("impatient")
def test_http_1_is_closed() -> None:
    async def main() -> None:
        async with serving(echoing()) as (server, _), connected(server.address) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await closed(reader)

    run(main)


@contextlib.asynccontextmanager
async def connected(
    address: str,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def feed(writer: asyncio.StreamWriter, pieces: object) -> None:
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)


async def closed(reader: asyncio.StreamReader) -> None:
    """Reads what the server says until it closes the connection."""

    async def to_the_end() -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                pass

    await asyncio.wait_for(to_the_end(), PATIENCE_S)
