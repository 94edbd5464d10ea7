"""Strangers on the HTTP port: slow, large, silent or strange."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from vlcache.worker.v1 import decode_pb2

from router.http import body, connection, schema
from tests.unit.router.fakes import run
from tests.unit.router.http.served import CHAT, chat, error_of, served, until

HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n".encode()


def test_a_head_that_does_not_come_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)

    async def main() -> None:
        async with served() as s:
            for sent in (b"", b"POST /v1", HEAD):
                begin_s = time.monotonic()
                assert await s.say(sent) == b""
                assert time.monotonic() - begin_s < 5
            # a second one on the same connection, after a first that was answered
            reader, writer = await s.connect()
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"SERVING" in await reader.read(4096)
            await asyncio.sleep(0.5)
            writer.write(b"GET /health HT")
            await asyncio.sleep(0.1)
            assert not reader.at_eof()
            assert await asyncio.wait_for(reader.read(1), 5) == b""
            writer.close()

    run(main)


def test_a_head_that_is_too_large() -> None:
    async def main() -> None:
        async with served() as s:
            line = b"x-filler: " + b"a" * 1000 + b"\r\n"
            assert await s.say(HEAD + line * 200) == b""
            assert b" 200 " in await s.say(b"GET /health HTTP/1.1\r\nhost: x\r\n" + line * 40 + b"\r\n")

    run(main)


@pytest.mark.parametrize(
    "sent", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_what_is_no_http(sent: bytes) -> None:
    async def main() -> None:
        async with served() as s:
            said = await s.say(sent)
            assert said == b"" or b" 400 " in said
            assert (await s.ask()).status_code == 200

    run(main)


def test_a_body_that_dribbles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with served() as s:
            said = await s.say(HEAD + b"content-length: 100\r\n\r\n{")
            assert b" 408 " in said
            assert b"connection: close" in said
            assert s.bench.metric("requests_total", outcome="refused", code="DEADLINE_EXCEEDED") == 1

    run(main)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    monkeypatch.setattr(body, "MAX_REQUEST_BYTES", 1000)

    async def main() -> None:
        async with served() as s:
            if chunked:
                sent = HEAD + b"transfer-encoding: chunked\r\n\r\n" + (b"190\r\n" + b"a" * 400 + b"\r\n") * 3
            else:
                # not a byte of it
                sent = HEAD + b"content-length: 1001\r\n\r\n"
            said = await s.say(sent)
            assert b" 413 " in said
            assert b'"code":"too_large"' in said
            assert b"connection: close" in said
            assert (await s.ask()).status_code == 200

    run(main)


def test_all_structure_and_no_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MAX_STRUCTURE", 100)

    async def main() -> None:
        async with served() as s:
            response = await s.client.post(CHAT, json={**chat(), "z": [{}] * 101})
            assert (response.status_code, error_of(response)["type"]) == (400, "invalid_request_error")

    run(main)


def test_a_client_that_reads_nothing_loses_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.3)

    async def main() -> None:
        async with served() as s:

            async def flood(stream: Any, handle: int, token: bytes) -> None:
                while True:
                    text = "x" * 100_000
                    stream.send(decode_pb2.SequenceUpdate(handle=handle, token_ids=[2], text=text))
                    await asyncio.sleep(0.001)

            s.decode.script = flood
            reader, writer = await s.connect()
            body = b'{"stream": true, "messages": [{"role": "user", "content": "a"}]}'
            writer.write(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            # a paused reader's buffer and the kernel's fill up
            reader._transport.pause_reading()
            await asyncio.wait_for(until(lambda: s.bench.metric("cancellations_total", stage="decode") == 1), 10)
            writer.close()

    run(main)
