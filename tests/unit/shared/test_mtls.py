"""Connections between services: who gets one, who does not, and what happens when certificates are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from shared.errors import UnavailableError
from shared.rpc.identity import Identity
from shared.rpc.line import Line
from tests.certificates import Certificates
from tests.unit.shared.scripted import run
from tests.unit.shared.secured import RESERVE, channel_to, code_of, worker


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Another CA, of which nobody has heard."""
    return Certificates(tmp_path_factory.mktemp("other-ca"))


def test_a_router_with_its_certificate_is_let_in(certificates: Certificates) -> None:
    async def main() -> None:
        async with worker(certificates.identity("decode")) as address:
            assert await code_of(address, certificates.channel("router")) == "OK"
            assert await code_of(address.replace("127.0.0.1", "localhost"), certificates.channel("router")) == "OK"

    run(main)


def test_callers_without_a_right_certificate_are_not_let_in(certificates: Certificates, others: Certificates) -> None:
    async def main() -> None:
        callers = {
            "signed by another CA": others.channel("router", ca=certificates.ca),
            "expired": certificates.channel("router", days=-0.5),
            "none at all": grpc.ssl_channel_credentials(certificates.ca.read_bytes()),
            "plaintext": None,
        }
        async with worker(certificates.identity("decode")) as address:
            for what, credentials in callers.items():
                assert await code_of(address, credentials) == "UNAVAILABLE", what
            assert await code_of(address, certificates.channel("router")) == "OK"

    run(main)


def test_callers_do_not_talk_to_servers_without_a_right_certificate(
    certificates: Certificates, others: Certificates
) -> None:
    async def main() -> None:
        router = certificates.channel("router")
        for identity in (others.identity("decode"), certificates.identity("decode", hosts=["elsewhere"])):
            async with worker(identity) as address:
                assert await code_of(address, router) == "UNAVAILABLE"

    run(main)


def test_tls_to_plaintext_fails(certificates: Certificates) -> None:
    async def main() -> None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        assert await code_of(f"127.0.0.1:{port}", certificates.channel("router")) == "UNAVAILABLE"
        await server.stop(0)

    run(main)


def test_the_roles_of_a_server_can_be_seen(certificates: Certificates, others: Certificates) -> None:
    async def main() -> None:
        router = certificates.identity("router")
        async with worker(certificates.identity("both", roles=["prefill", "decode"])) as address:
            assert await router.roles_at(address, timeout_s=5) == {"prefill", "decode"}
        with pytest.raises(UnavailableError):
            await router.roles_at(address, timeout_s=5)
        for identity in (others.identity("decode"), certificates.identity("decode", hosts=["elsewhere"])):
            async with worker(identity) as address:
                with pytest.raises(UnavailableError):
                    await router.roles_at(address, timeout_s=5)

    run(main)


def echoing(server: grpc.aio.Server) -> None:
    """StreamTokens sends back what it gets."""

    async def echo(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message

    async def reserve(request: bytes, context: Any) -> bytes:
        return b""

    handlers = {
        "StreamTokens": grpc.stream_stream_rpc_method_handler(echo),
        "Reserve": grpc.unary_unary_rpc_method_handler(reserve),
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("vlcache.worker.v1.DecodeService", handlers),)
    )


async def echoed(stream: Any, message: bytes) -> bytes:
    await stream.write(message)
    return await stream.read()


def test_a_server_uses_new_files_for_new_connections_and_running_streams_go_on(
    tmp_path: Path, certificates: Certificates, others: Certificates
) -> None:
    mine = Certificates(tmp_path)
    files = mine.files("decode")
    identity = Identity(files, ["decode"])

    async def main() -> None:
        async with worker(identity, echoing) as address, channel_to(address, mine.channel("router")) as channel:
            stream = channel.stream_stream("/vlcache.worker.v1.DecodeService/StreamTokens")()
            assert await echoed(stream, b"before") == b"before"
            assert await code_of(address, others.channel("router")) == "UNAVAILABLE"
            replaced = others.files("decode")
            for old, new in ((files.key, replaced.key), (files.cert, replaced.cert), (files.ca, replaced.ca)):
                new_bytes = new.read_bytes()
                old.with_suffix(".new").write_bytes(new_bytes)
                old.with_suffix(".new").replace(old)
            # the new CA is let in, the old one is not any more, and sees nothing that it trusts either
            assert await code_of(address, others.channel("router")) == "OK"
            assert await code_of(address, certificates.channel("router", ca=others.ca)) == "UNAVAILABLE"
            assert await echoed(stream, b"after") == b"after"
            await stream.done_writing()

    run(main)


def test_files_that_cannot_be_used_leave_what_was_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = Certificates(tmp_path)
    files = mine.files("decode")
    identity = Identity(files, ["decode"])
    before = identity.current()
    key = files.key.read_bytes()
    for wrong in (b"no key", b"", mine.files("other").key.read_bytes()):
        files.key.write_bytes(wrong)
        assert identity.current() is before
        assert identity.current() is before
        assert caplog.text.count("what was read before stays in use") == 1
        caplog.clear()
    files.key.unlink()
    assert identity.current() is before
    files.key.write_bytes(key)
    assert identity.current().key == key


def test_a_caller_uses_new_files_for_new_calls_and_running_streams_go_on(tmp_path: Path, others: Certificates) -> None:
    mine = Certificates(tmp_path)
    files = mine.files("router")
    identity = Identity(files, ["router"])

    async def main() -> None:
        async with worker(mine.identity("decode"), echoing) as address, worker(others.identity("decode")) as elsewhere:
            line = Line(address, [("grpc.use_local_subchannel_pool", 1)], identity)
            far = Line(elsewhere, [("grpc.use_local_subchannel_pool", 1)], identity)
            first = line.channel()
            stream = first.stream_stream("/vlcache.worker.v1.DecodeService/StreamTokens")()
            assert await echoed(stream, b"before") == b"before"
            assert line.channel() is first
            with pytest.raises(grpc.aio.AioRpcError):
                await far.channel().unary_unary(RESERVE)(b"", timeout=5)
            replaced = others.files("router")
            for old, new in ((files.key, replaced.key), (files.cert, replaced.cert), (files.ca, replaced.ca)):
                old.write_bytes(new.read_bytes())
            assert await far.channel().unary_unary(RESERVE)(b"", timeout=5) == b"answered"
            assert line.channel() is not first
            await asyncio.sleep(0.05)
            assert await echoed(stream, b"after") == b"after"
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            await line.close()
            await far.close()

    run(main)


def test_a_channel_that_was_replaced_is_closed_when_its_last_call_has_ended(tmp_path: Path) -> None:
    mine = Certificates(tmp_path)
    files = mine.files("router")
    identity = Identity(files, ["router"])

    async def main() -> None:
        async with worker(mine.identity("decode"), echoing) as address:
            line = Line(address, [], identity)
            stream = line.channel().stream_stream("/vlcache.worker.v1.DecodeService/StreamTokens")()
            assert await echoed(stream, b"x") == b"x"
            mine.files("router")
            line.channel()
            assert len(line._retired) == 1
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
            await asyncio.gather(*line._retired.values())
            assert not line._retired
            await line.close()

    run(main)
