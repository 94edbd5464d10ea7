"""Tokens and TLS of both clients: what is sent, to whom, and what is refused before anything is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from vlcache import AsyncClient, Client, RetryPolicy, Timeout, Tls, Unavailable
from vlcache._channel import stays_here
from vlcache.cli import main
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc

from tests.certificates import Certificates
from tests.unit.client.service import ScriptedService, whole_answer

ONCE = {"timeout": Timeout(connect_s=2, total_s=10), "retry": RetryPolicy(max_attempts=1)}


class Listening(ScriptedService):
    """Writes down what the metadata of every call says of the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[str | None] = []
        self.models = [[pb.Model(name="m")]]

    def _note(self, context: grpc.ServicerContext) -> None:
        self.tokens.append(dict(context.invocation_metadata()).get("authorization"))

    def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._note(context)
        yield from super().Generate(request, context)

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._note(context)
        return super().ListModels(request, context)

    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._note(context)
        return super().GetServerInfo(request, context)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def serve() -> Iterator[Callable[..., Listening]]:
    servers = []

    def start(credentials: grpc.ServerCredentials | None = None) -> Listening:
        service, server = Listening(), grpc.server(futures.ThreadPoolExecutor(2))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
        where = "127.0.0.1:0"
        port = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
        service.address = f"127.0.0.1:{port}"
        server.start()
        servers.append(server)
        return service

    yield start
    for server in servers:
        server.stop(None).wait()


def ask_everything(address: str, **options: Any) -> None:
    with Client(address, **ONCE, **options) as client:
        client.wait_ready(5)
        assert client.generate("Which?").text == "a red dot"
        client.models()
        client.info()


async def ask_everything_async(address: str, **options: Any) -> None:
    async with AsyncClient(address, **ONCE, **options) as client:
        await client.wait_ready(5)
        assert (await client.generate("Which?")).text == "a red dot"
        await client.models()
        await client.info()


@pytest.mark.parametrize("twin", [ask_everything, lambda *args, **kw: asyncio.run(ask_everything_async(*args, **kw))])
def test_every_call_carries_the_token(serve: Callable[..., Listening], twin: Callable[..., None]) -> None:
    service = serve()
    service.attempts = [whole_answer()]
    twin(service.address, token="t0ken")
    assert service.tokens == ["Bearer t0ken"] * 4


@pytest.mark.parametrize("twin", [ask_everything, lambda *args, **kw: asyncio.run(ask_everything_async(*args, **kw))])
def test_tls_with_and_without_a_certificate_of_the_clients_own(
    serve: Callable[..., Listening], certificates: Certificates, twin: Callable[..., None]
) -> None:
    router, mine = certificates.identity("router"), certificates.files("client")
    for demand, tls in ((False, Tls(ca=mine.ca)), (True, Tls(ca=mine.ca, cert=mine.cert, key=mine.key))):
        service = serve(router.server_credentials(demand_client_cert=demand))
        service.attempts = [whole_answer()]
        twin(service.address, tls=tls, token="t")
    with pytest.raises(Unavailable), Client(service.address, tls=Tls(ca=mine.ca), **ONCE) as client:
        client.models()


def test_a_service_of_another_ca_is_not_asked(
    serve: Callable[..., Listening], certificates: Certificates, tmp_path: Path
) -> None:
    service = serve(certificates.identity("router").server_credentials(demand_client_cert=False))
    with pytest.raises(Unavailable), Client(service.address, tls=Tls(ca=Certificates(tmp_path).ca), **ONCE) as client:
        client.models()
    assert service.tokens == []


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_token_never_leaves_the_machine_in_plaintext(kind: type, certificates: Certificates) -> None:
    for address in ("router.example:50051", "10.0.0.1:1", "ipv4:127.0.0.1:1,10.0.0.1:1", "dns:///router:1", "[::2]:1"):
        with pytest.raises(ValueError, match="plaintext") as caught:
            kind(address, token="secret")
        assert "secret" not in str(caught.value)
    with Client("router.example:50051", token="secret", tls=Tls(ca=certificates.ca)):
        pass


@pytest.mark.parametrize(
    ("address", "stays"),
    [
        ("127.0.0.1:50051", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("localhost", True),
        ("[::1]:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/router.sock", True),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("0.0.0.0:1", False),
        ("::1.example:1", False),
        ("", False),
    ],
)
def test_who_is_near(address: str, stays: bool) -> None:
    assert stays_here(address) is stays


@pytest.mark.parametrize("token", ["", "a b", "a\n", "é"])
def test_impossible_tokens_are_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="a token has") as caught:
        Client(token=token)
    assert not token or token not in str(caught.value)


def test_half_a_certificate_is_refused() -> None:
    with pytest.raises(ValueError, match="belong together"):
        Tls(cert="a.pem")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none\.pem"):
        Client(tls=Tls(ca=tmp_path / "none.pem"))


def test_the_command_takes_the_token_from_the_environment(
    serve: Callable[..., Listening],
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = certificates.files("client")
    service = serve(certificates.identity("router").server_credentials(demand_client_cert=True))
    service.attempts = [whole_answer()]
    files = ["--ca-file", str(mine.ca), "--cert-file", str(mine.cert), "--key-file", str(mine.key)]
    monkeypatch.setenv("VLCACHE_TOKEN", "from-the-environment")
    assert main(["ask", "Which?", "--address", service.address, *files]) == 0
    assert main(["status", "--address", service.address, *files]) == 0
    assert service.tokens == ["Bearer from-the-environment"] * 2
    assert capsys.readouterr().out.startswith("a red dot")
    assert main(["status", "--address", "router.example:1"]) == 2
    assert "plaintext" in capsys.readouterr().err
    assert os.environ["VLCACHE_TOKEN"] not in capsys.readouterr().err
