"""Every RPC between services has one role that may call it, and all others are refused, over real mTLS."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2

from shared.errors import PermissionDeniedError
from shared.rpc.access import CALLERS, check_caller
from shared.rpc.status import from_rpc_error
from tests.certificates import Certificates
from tests.unit.shared.scripted import run
from tests.unit.shared.secured import ANSWER, METHODS, call, channel_to, health, path_of, worker

ROLES = {"router": ["router"], "prefill": ["prefill"], "decode": ["decode"], "combined": ["prefill", "decode"]}
STRANGERS = {"client": ["client"], "nobody": []}


def test_the_table_has_every_rpc_of_the_contract_and_nothing_else() -> None:
    assert set(CALLERS) == {path_of(method) for method in METHODS}
    assert len(METHODS) > 10


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ca"))


def test_each_role_may_call_what_the_table_says_and_nothing_else(certificates: Certificates) -> None:
    async def main() -> None:
        async with worker(certificates.identity("decode")) as address:
            for name, roles in (ROLES | STRANGERS).items():
                async with channel_to(address, certificates.channel(name, roles=roles)) as channel:
                    passed = {path_of(method) for method in METHODS if await passes(channel, method)}
                assert passed == {path for path, role in CALLERS.items() if role in roles}, name

    run(main)


async def passes(channel: grpc.aio.Channel, method: MethodDescriptor) -> bool:
    try:
        assert await call(channel, method) == ANSWER
    except grpc.aio.AioRpcError as error:
        meant = from_rpc_error(error)
        assert (type(meant), meant.reason) == (PermissionDeniedError, "ROLE"), path_of(method)
        return False
    return True


@pytest.mark.parametrize("name", [*ROLES, *STRANGERS])
def test_whoever_has_a_certificate_may_ask_for_health(certificates: Certificates, name: str) -> None:
    async def main() -> None:
        async with worker(certificates.identity("prefill")) as address:
            roles = (ROLES | STRANGERS)[name]
            answer = await health(address, certificates.channel(name, roles=roles))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING

    run(main)


def test_an_rpc_that_the_table_does_not_know_is_refused(certificates: Certificates) -> None:
    def register(server: grpc.aio.Server) -> None:
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("new.Service", {"New": handler}),))

    async def main() -> None:
        async with (
            worker(certificates.identity("decode"), register) as address,
            channel_to(address, certificates.channel("router")) as channel,
        ):
            for path in ("/new.Service/New", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(path)(b"", timeout=5)
                # there is no reflection at all where there are certificates
                expected = "PERMISSION_DENIED" if path.startswith("/new") else "UNIMPLEMENTED"
                assert caught.value.code().name == expected

    run(main)


def test_a_role_is_the_whole_uri(certificates: Certificates, tmp_path: Path) -> None:
    for role in ("router/x", "xrouter", ""):
        with pytest.raises(PermissionDeniedError):
            check_caller("/vlcache.worker.v1.DecodeService/Reserve", frozenset([role]))
