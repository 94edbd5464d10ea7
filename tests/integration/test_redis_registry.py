"""The registry over a real Redis: what workers write, what routers read, and how little of Redis they need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from vlcache.worker.v1 import worker_pb2

from shared.config import Listen
from shared.errors import UnavailableError
from shared.registry import presence, redis_client, redis_listing, redis_registry
from shared.registry.entry import Entry
from shared.registry.presence import listed
from shared.registry.redis_client import PASSWORD_VARIABLE
from shared.registry.redis_listing import RedisListing
from shared.registry.redis_listing import open_listing as listing_at
from shared.registry.redis_registry import RedisRegistry
from shared.registry.redis_registry import open_registry as registry_at
from shared.rpc.serving import serve
from shared.telemetry.metrics import DecodeMetrics
from tests.integration.redis_server import ROUTER_ACL, WORKER_ACL, RedisServer

TIMEOUT_S = 30.0
ENTRIES = "vlcache:worker:"


@pytest.fixture(autouse=True)
def no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """A running Redis without a key."""
    with shared_server.admin() as client:
        client.flushall()
    return shared_server


def entry(number: int = 1, *, role: str = "decode", epoch: str | None = None) -> Entry:
    info = worker_pb2.WorkerInfo(name="w", role=role, epoch=epoch or f"e{number}", state="ready")
    return Entry(address=f"10.0.0.{number}:50051", info=info)


@contextlib.asynccontextmanager
async def both_sides(location: str) -> AsyncIterator[tuple[RedisListing, RedisRegistry]]:
    listing, registry = listing_at(location), registry_at(location)
    try:
        yield listing, registry
    finally:
        await listing.close()
        await registry.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, TIMEOUT_S))


async def becomes(wanted: Callable[[], Awaitable[bool]]) -> None:
    """Asks until the answer is yes; `run` limits the time."""
    while not await wanted():  # noqa: ASYNC110 - Redis says nothing of its own accord
        await asyncio.sleep(0.02)


def test_what_workers_publish_routers_find(server: RedisServer) -> None:
    async def main() -> None:
        async with both_sides(server.location) as (listing, registry), both_sides(server.location) as (_, other):
            assert await registry.addresses() == []
            # two processes of one name, and two roles of one process
            published = [entry(2), entry(1), entry(3, role="prefill", epoch="e1")]
            await listing.publish(published)
            found = [f"10.0.0.{number}:50051" for number in (1, 2, 3)]
            assert await registry.addresses() == await other.addresses() == found
            with server.admin() as client:
                keys = sorted(client.keys())
                assert keys == [f"{ENTRIES}decode:e1", f"{ENTRIES}decode:e2", f"{ENTRIES}prefill:e1"]
                assert all(0 < client.ttl(key) <= redis_listing.EXPIRY_S for key in keys)
                assert json.loads(client.get(keys[0]))["worker"]["state"] == "ready"
            await listing.withdraw(published[:2])
            assert await registry.addresses() == ["10.0.0.3:50051"]

    run(main())


def test_a_restarted_worker_is_one_address_while_its_old_key_lasts(server: RedisServer) -> None:
    async def main() -> None:
        async with both_sides(server.location) as (listing, registry):
            await listing.publish([entry(1, epoch="old")])
            await listing.publish([entry(1, epoch="new")])
            assert await registry.addresses() == ["10.0.0.1:50051"]
            await listing.withdraw([entry(1, epoch="old")])
            assert await registry.addresses() == ["10.0.0.1:50051"]

    run(main())


def test_prefixes_and_databases_keep_registries_apart(server: RedisServer) -> None:
    async def main() -> None:
        for number, suffix in enumerate(("", "?prefix=blue:", "/1", "/1?prefix=blue:"), start=1):
            async with both_sides(server.location + suffix) as (listing, registry):
                await listing.publish([entry(number)])
                assert await registry.addresses() == [f"10.0.0.{number}:50051"]

    run(main())


def test_many_keys_take_several_rounds(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_registry, "SCAN_COUNT", 10)
    monkeypatch.setattr(redis_registry, "MAX_READS", 64)

    async def main() -> None:
        async with both_sides(server.location) as (listing, registry):
            with server.admin() as client:
                client.mset({f"someone:else:{number}": "x" for number in range(300)})
            await listing.publish([entry(number) for number in range(200)])
            for seen in (64, 128, 192, 200, 200):
                assert len(await registry.addresses()) == seen

    run(main())


def test_malformed_entries_are_skipped_and_said_once(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with both_sides(server.location) as (listing, registry):
            await listing.publish([entry(1)])
            with server.admin() as client:
                client.set(f"{ENTRIES}text", "nonsense")
                client.set(f"{ENTRIES}long", "x" * 10_000_000)
                client.set(f"{ENTRIES}target", json.dumps({"address": "unix:/tmp/x:1"}))
                client.set(ENTRIES.encode() + b"\xff\n", b"\xff")
                client.hset(f"{ENTRIES}hash", "address", "10.0.0.9:1")
            for _ in range(3):
                assert await registry.addresses() == ["10.0.0.1:50051"]
            assert len(caplog.records) == 5
            assert all("is skipped" in record.getMessage() for record in caplog.records)
            with server.admin() as client:
                client.set(f"{ENTRIES}text", entry(2).to_json())
            assert await registry.addresses() == ["10.0.0.1:50051", "10.0.0.2:50051"]

    with caplog.at_level(logging.INFO):
        run(main())


def test_malformed_entries_never_crowd_out_a_worker(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_registry, "MAX_READS", 10)

    async def main() -> None:
        async with both_sides(server.location) as (listing, registry):
            with server.admin() as client:
                client.mset({f"{ENTRIES}a{number}": "nonsense" for number in range(20)})
            await listing.publish([entry(1)])
            for _ in range(3):
                found = await registry.addresses()
            assert found == ["10.0.0.1:50051"]

    run(main())


def test_too_many_entries_leave_the_last_view(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_registry, "MAX_ENTRIES", 50)

    async def main() -> None:
        async with both_sides(server.location) as (listing, registry):
            await listing.publish([entry(1)])
            assert await registry.addresses() == ["10.0.0.1:50051"]
            await listing.publish([entry(number) for number in range(2, 80)])
            assert await registry.addresses() == ["10.0.0.1:50051"]

    run(main())


@pytest.mark.parametrize(("database", "more"), [("", ()), ("/1", ("+select",))])
def test_each_side_needs_only_the_documented_rights(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, database: str, more: tuple[str, ...]
) -> None:
    worker = server.add_user("worker", "w0rker", *WORKER_ACL, *more) + database
    router = server.add_user("router", "r0uter", *ROUTER_ACL, *more) + database

    async def main() -> None:
        monkeypatch.setenv(PASSWORD_VARIABLE, "w0rker")
        listing = listing_at(worker)
        monkeypatch.setenv(PASSWORD_VARIABLE, "r0uter")
        registry = registry_at(router)
        await listing.publish([entry(1)])
        assert await registry.addresses() == ["10.0.0.1:50051"]
        await listing.withdraw([entry(1)])
        assert await registry.addresses() == []
        await listing.close()
        await registry.close()
        with server.admin() as client:
            assert client.acl_log() == [], "something else was tried"

    run(main())


def test_who_may_not_is_told_so_without_the_password(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    reader = server.add_user("reader", "s3cret", *ROUTER_ACL).replace("@", ":s3cret@")
    writer = server.add_user("writer", "s3cret", *WORKER_ACL).replace("@", ":s3cret@")
    with server.admin() as client:
        client.set("other:worker:decode:1", entry(1).to_json())

    async def main() -> None:
        # each in the other's place, a foreign prefix, a wrong password
        for location in (writer, reader + "?prefix=other:", reader.replace("s3cret", "wr0ng")):
            async with both_sides(location) as (_, registry):
                before = len(caplog.records)
                for _ in range(2):
                    assert await registry.addresses() == []
                assert [record.levelname for record in caplog.records[before:]] == ["WARNING"]
        for location in (reader, writer + "?prefix=other:", writer.replace("s3cret", "wr0ng")):
            async with both_sides(location) as (listing, _):
                with pytest.raises(UnavailableError, match=r"Redis: \w+Error: .") as refused:
                    await listing.publish([entry(2)])
                assert not {"s3cret", "wr0ng"} & set(re.findall(r"\w+", str(refused.value)))

    with caplog.at_level(logging.DEBUG, logger="shared"):
        run(main())
    assert "s3cret" not in caplog.text
    assert "wr0ng" not in caplog.text


def certificate(folder: Path, name: str, *, alternative: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}"]
    try:
        subprocess.run([*words, "-out", str(cert), "-keyout", str(key)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make certificates with")
    return cert, key


@contextlib.asynccontextmanager
async def tls_in_front_of(server: RedisServer, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Ends TLS before a server that was built without it; the port."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, before = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pump(reader, before), pump(behind, writer))

    front = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with front:
        yield front.sockets[0].getsockname()[1]


def test_tls_checks_both_ends(server: RedisServer, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "redis", alternative="IP:127.0.0.1")
    own, own_key = certificate(tmp_path, "client", alternative="DNS:client")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(own))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(cert, key)

    async def main() -> None:
        async with tls_in_front_of(server, context) as port:
            known, mine = f"ssl_ca_certs={cert}", f"ssl_certfile={own}&ssl_keyfile={own_key}"
            async with both_sides(f"rediss://127.0.0.1:{port}?{known}&{mine}") as (listing, registry):
                await listing.publish([entry(1)])
                assert await registry.addresses() == ["10.0.0.1:50051"]
            refused = [
                f"rediss://127.0.0.1:{port}?{mine}",  # who is that?
                f"rediss://localhost:{port}?{known}&{mine}",  # not the name in its certificate
                f"rediss://127.0.0.1:{port}?{known}",  # and who are you?
                f"redis://127.0.0.1:{port}",  # no TLS
            ]
            for location in refused:
                async with both_sides(location) as (listing, _):
                    with pytest.raises(UnavailableError):
                        await listing.publish([entry(2)])
        with server.admin() as client:
            assert client.keys() == [f"{ENTRIES}decode:e1"]

    run(main())


class Role:
    """A worker whose last request ends when the test says so."""

    role, name, services, max_request_bytes = "decode", "w", (), 1 << 20
    listen = Listen(host="127.0.0.1", advertise="node-1:0")

    def __init__(self) -> None:
        self.metrics = DecodeMetrics(worker="w", model="m")
        self.state, self.last_request = "ready", asyncio.Event()

    def register(self, server: grpc.aio.Server) -> None:
        pass

    def info(self) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo(name=self.name, role=self.role, epoch="e1", state=self.state)

    async def drain(self, timeout_s: float) -> None:
        self.state = "draining"
        await self.last_request.wait()

    async def close(self) -> None:
        pass


def test_a_worker_is_listed_while_it_serves_and_says_at_once_that_it_drains(
    server: RedisServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is not said at once is never said
    monkeypatch.setattr(presence, "BEAT_S", 1000.0)

    async def main() -> None:
        role = Role()

        async def listed_as(state: str) -> bool:
            with server.admin() as client:
                value = client.get(f"{ENTRIES}decode:e1")
            return value is not None and json.loads(value)["worker"]["state"] == state

        serving = asyncio.create_task(serve([role], drain_s=7, registry=server.location))
        await becomes(lambda: listed_as("ready"))
        port = json.loads(capsys.readouterr().out)["address"].rpartition(":")[2]
        registry = registry_at(server.location)
        assert await registry.addresses() == [f"node-1:{port}"]
        os.kill(os.getpid(), signal.SIGTERM)
        await becomes(lambda: listed_as("draining"))
        assert await registry.addresses() == [f"node-1:{port}"]
        role.last_request.set()
        await serving
        assert await registry.addresses() == []
        await registry.close()

    run(main())


def test_an_outage_keeps_the_last_view_and_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(presence, "BEAT_S", 0.1)
    monkeypatch.setattr(presence, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(presence, "MAX_RETRY_S", 0.1)

    async def main(server: RedisServer) -> None:
        registry, fresh = registry_at(server.location), registry_at(server.location)
        async with listed(server.location, lambda: [entry(1)]):

            async def found() -> bool:
                return list(await registry.addresses()) == ["10.0.0.1:50051"]

            async def found_by_a_newcomer() -> bool:
                return list(await fresh.addresses()) == ["10.0.0.1:50051"]

            await becomes(found)
            server.stop()
            for _ in range(3):
                assert await found()
                assert not await found_by_a_newcomer()
            await asyncio.sleep(0.3)
            server.start()
            await becomes(found_by_a_newcomer)
            await becomes(found)
        # leaving took the key away
        assert await registry.addresses() == []
        await registry.close()
        await fresh.close()

    with caplog.at_level(logging.INFO), RedisServer() as server:
        run(main(server))
    # two registries and a presence, each with one warning and one relief
    assert sorted(record.levelname for record in caplog.records) == ["INFO"] * 3 + ["WARNING"] * 3


# A worker is content with these.
PLAUSIBLE = (b"*1\r\n:1\r\n", b"+OK\r\n")


@pytest.mark.parametrize(
    "said",
    [b"", b"*1\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b":x\r\n", b"$x\r\n", b"*x\r\n", b"*1\r\n:1\r\n", b"+OK\r\n"],
)
def test_what_is_no_redis_harms_nobody_and_holds_up_nobody(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "CALL_TIMEOUT_S", 0.2)

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.read(4096):
                writer.write(said)
            writer.close()

        stranger = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with stranger:
            location = f"redis://127.0.0.1:{stranger.sockets[0].getsockname()[1]}"
            async with both_sides(location) as (listing, registry):
                started = asyncio.get_running_loop().time()
                assert await registry.addresses() == []
                with contextlib.nullcontext() if said in PLAUSIBLE else pytest.raises(UnavailableError):
                    await listing.publish([entry(1)])
                assert asyncio.get_running_loop().time() - started < redis_client.SOCKET_TIMEOUT_S

    run(main())
