"""Images by URL: from hosts on the list, never from inside, whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from router.http import addresses, remote_images
from router.http.addresses import is_public
from router.http.errors import InvalidFieldError
from router.http.remote_images import RemoteImages
from tests.certificates import Certificates
from tests.unit.router.fakes import run
from tests.unit.router.http.served import until

IMAGE = b"\x89PNG and so on"
WHERE = "messages[0].content[0].image_url.url"


def response(content: bytes = IMAGE, status: str = "200 OK", **headers: str) -> bytes:
    fields = {"content-type": "image/png", "content-length": str(len(content)), "connection": "close"}
    named = fields | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + content


class Host:
    """A web server that says one thing, and what it was asked."""

    def __init__(self, said: bytes) -> None:
        self.said = said
        self.asked: list[str] = []
        self.pause_s = 0.0
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
            await asyncio.sleep(self.pause_s)
            writer.write(self.said)
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def host(said: bytes | None = None, tls: ssl.SSLContext | None = None) -> AsyncIterator[Host]:
    made = Host(response() if said is None else said)
    server = await asyncio.start_server(made.answer, "127.0.0.1", 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await server.wait_closed()


async def to_loopback(name: str, port: int) -> list[str]:
    return ["127.0.0.1"]


async def fetch(url: str, hosts: tuple[str, ...], **options: Any) -> bytes:
    """As a router would whose operator takes 127.0.0.1 for public."""
    remote = RemoteImages(hosts, **{"resolve": to_loopback, "allows": lambda _: True, **options})
    try:
        return (await remote.fetch({url: WHERE}))[url]
    finally:
        await remote.close()


async def refusal(url: str, hosts: tuple[str, ...], **options: Any) -> str:
    with pytest.raises(InvalidFieldError) as caught:
        await fetch(url, hosts, **options)
    assert caught.value.param == WHERE
    return caught.value.reason


def test_a_named_host() -> None:
    async def main() -> None:
        async with host() as web:
            url = f"http://images.example:{web.port}/a.png?size=1"
            assert await fetch(url, (f"Images.Example:{web.port}",)) == IMAGE
            (asked,) = web.asked
            assert asked.startswith("get /a.png?size=1 http/1.1")
            assert f"host: images.example:{web.port}" in asked
            assert "accept-encoding: identity" in asked

    run(main)


def test_only_the_hosts_on_the_list() -> None:
    async def main() -> None:
        async with host() as web:
            for url in (
                f"http://other.example:{web.port}/",
                f"http://images.example.other:{web.port}/",
                f"http://127.0.0.1:{web.port}/",
                # another port of a host on the list
                "http://images.example:1/",
                "http://[",
            ):
                assert await refusal(url, ("images.example", f"images.example:{web.port}")) == "URL_HOST"
            for url in (
                f"http://images.example@127.0.0.1:{web.port}/",
                f"http://me:secret@images.example:{web.port}/",
                f"ftp://images.example:{web.port}/",
                "http://",
                "nothing",
            ):
                assert await refusal(url, (f"images.example:{web.port}",)) == "URL"
            assert web.asked == []

    run(main)


def test_addresses_that_are_not_public_are_refused_by_default() -> None:
    async def main() -> None:
        async with host() as web:
            for name in ("127.0.0.1", "localhost"):
                remote = RemoteImages((f"{name}:{web.port}",))
                url = f"http://{name}:{web.port}/"
                with pytest.raises(InvalidFieldError) as caught:
                    await remote.fetch({url: WHERE})
                await remote.close()
                assert caught.value.reason == "URL_ADDRESS"
            assert web.asked == []

    run(main)


def test_one_private_address_among_public_ones_is_enough() -> None:
    async def mixed(name: str, port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.1"]

    async def nothing(name: str, port: int) -> list[str]:
        return []

    async def main() -> None:
        for resolve in (mixed, nothing):
            assert (
                await refusal("http://a.example/", ("a.example",), resolve=resolve, allows=is_public) == "URL_ADDRESS"
            )

    run(main)


def test_a_name_is_resolved_once_and_the_connection_goes_there() -> None:
    """What a name stands for when it is checked is what is connected to."""
    names: list[str] = []

    async def changing(name: str, port: int) -> list[str]:
        names.append(name)
        return ["127.0.0.1"] if len(names) == 1 else ["127.0.0.2"]

    async def main() -> None:
        async with host() as web:
            url = f"http://a.example:{web.port}/"
            assert await fetch(url, (f"a.example:{web.port}",), resolve=changing) == IMAGE
            assert names == ["a.example"]

    run(main)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (response(status="302 Found", location="http://127.0.0.1/"), "URL_STATUS"),
        (response(status="404 Not Found"), "URL_STATUS"),
        (response(content_type="text/html"), "URL_TYPE"),
        (response(content_type=""), "URL_TYPE"),
        (response(content_encoding="gzip"), "URL_TYPE"),
        (response(content_length="1000000"), "URL_UNREACHABLE"),
        (b"nothing\r\n\r\n", "URL_UNREACHABLE"),
        (b"", "URL_UNREACHABLE"),
        (response(b"x" * 2000), "URL_SIZE"),
        (response(b"x" * 2000, content_length=""), "URL_SIZE"),
    ],
)
def test_what_is_no_image_is_refused(said: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_images, "MAX_FILE_BYTES", 1000)

    async def main() -> None:
        async with host(said) as web:
            assert await refusal(f"http://a.example:{web.port}/", (f"a.example:{web.port}",)) == reason

    run(main)


def test_slow_hosts_and_hosts_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_images, "FETCH_TIMEOUT_S", 0.3)

    async def unknown(name: str, port: int) -> list[str]:
        raise OSError("no such name")

    async def main() -> None:
        async with host() as web:
            hosts = (f"a.example:{web.port}",)
            web.pause_s = 2.0
            assert await refusal(f"http://a.example:{web.port}/", hosts) in ("URL_TIMEOUT", "URL_UNREACHABLE")
            assert await refusal(f"http://a.example:{web.port}/", hosts, resolve=unknown) == "URL_UNREACHABLE"
        assert await refusal(f"http://a.example:{web.port}/", hosts) == "URL_UNREACHABLE"

    run(main)


def test_the_images_of_a_request_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_images, "MAX_REQUEST_BYTES", 3 * len(IMAGE))

    async def main() -> None:
        async with host() as web:
            remote = RemoteImages((f"a.example:{web.port}",), resolve=to_loopback, allows=lambda _: True)
            urls = {f"http://a.example:{web.port}/{number}": f"[{number}]" for number in range(17)}
            three = dict(list(urls.items())[:3])
            assert await remote.fetch(three) == dict.fromkeys(three, IMAGE)
            with pytest.raises(InvalidFieldError, match="an image has at most"):
                await remote.fetch(dict(list(urls.items())[:4]))
            with pytest.raises(InvalidFieldError, match="at most 16 URLs"):
                await remote.fetch(urls)
            await remote.close()

    run(main)


def test_the_certificate_is_the_names(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    own = certificates.files("web", hosts=["a.example"])
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(own.cert, own.key)

    async def main() -> None:
        async with host(tls=serving) as web:
            tls = ssl.create_default_context(cafile=str(certificates.ca))
            hosts = (f"a.example:{web.port}", f"b.example:{web.port}")
            assert await fetch(f"https://a.example:{web.port}/", hosts, tls=tls) == IMAGE
            assert await refusal(f"https://b.example:{web.port}/", hosts, tls=tls) == "URL_UNREACHABLE"
            # whom the public web trusts
            assert await refusal(f"https://a.example:{web.port}/", hosts) == "URL_UNREACHABLE"

    run(main)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
    ],
)
def test_other_addresses(address: str) -> None:
    assert not is_public(address)


def test_names_are_resolved_by_the_system() -> None:
    async def main() -> None:
        assert "127.0.0.1" in await addresses.resolve("127.0.0.1", 80)

    run(main)


def test_who_leaves_takes_the_fetches_along() -> None:
    async def main() -> None:
        async with host() as web:
            web.pause_s = 1.0
            asking = asyncio.create_task(fetch(f"http://a.example:{web.port}/", (f"a.example:{web.port}",)))
            await until(lambda: bool(web.asked))
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    run(main)
