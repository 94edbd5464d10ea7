"""The HTTP port over TLS: the certificate of the gRPC port, also when it changes."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import httpx
import pytest

from shared.rpc.identity import TlsFiles
from tests.certificates import Certificates, settings
from tests.unit.router.fakes import FakeDecode, FakePrefill, bench, run


def client(url: str, ca: Path, own: TlsFiles | None = None) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=str(ca))
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return httpx.AsyncClient(base_url=url, verify=context, trust_env=False)


def workers(certificates: Certificates) -> dict[str, list[object]]:
    made = {"prefill": [FakePrefill()], "decode": [FakeDecode()]}
    for role, (worker,) in made.items():
        worker.identity = certificates.identity(role)
    return made


async def shown(url: str) -> str:
    """The certificate of the next connection."""
    host, _, port = url.rpartition("/")[2].partition(":")
    return await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))


def test_the_certificate_is_checked_and_followed(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)

    async def main() -> None:
        files = certificates.files("router")
        async with bench(**workers(certificates), http_port=0, **settings(files)) as b:
            url = f"https://{b.router.http_address}"
            async with client(url, certificates.ca) as trusting:
                assert (await trusting.get("/health")).status_code == 200
            async with client(url, Certificates(tmp_path / "others").ca) as other:
                with pytest.raises(httpx.ConnectError):
                    await other.get("/health")
            async with httpx.AsyncClient(base_url=url.replace("https", "http"), trust_env=False) as plain:
                with pytest.raises(httpx.HTTPError):
                    await plain.get("/health")
            before = await shown(url)
            assert before == await shown(url)
            certificates.files("router")
            assert await shown(url) != before
            async with client(url, certificates.ca) as trusting:
                assert (await trusting.get("/health")).status_code == 200

    run(main)


def test_a_client_may_need_a_certificate(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)

    async def main() -> None:
        own, router = certificates.files("client"), settings(certificates.files("router"))
        async with bench(**workers(certificates), http_port=0, demand_client_cert=True, **router) as b:
            url = f"https://{b.router.http_address}"
            async with client(url, certificates.ca, own) as known:
                assert (await known.get("/health")).status_code == 200
            stranger = Certificates(tmp_path / "others").files("client")
            for own_or_none in (None, stranger):
                async with client(url, certificates.ca, own_or_none) as refused:
                    with pytest.raises(httpx.HTTPError):
                        await refused.get("/health")

    run(main)
