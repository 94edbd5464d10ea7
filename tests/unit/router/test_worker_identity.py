"""A router believes only workers with a certificate of the role that they say they have, and says who it is itself."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc
from vlcache.worker.v1 import decode_pb2

from router.config import RouterConfig
from router.router import Router
from router.workers.client import WorkerClient
from shared.errors import UnavailableError
from shared.rpc.identity import Identity
from tests.certificates import Certificates, settings
from tests.unit.router.fakes import Bench, FakeDecode, FakePrefill, FakeWorker, config_for, kinds, run


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ca"))


@contextlib.asynccontextmanager
async def asked(worker: FakeWorker, identity: Identity, router: Identity) -> AsyncIterator[WorkerClient]:
    """The client of a router with one identity, for a worker with another."""
    worker.identity = identity
    await worker.start()
    client = WorkerClient(worker.address, poll_timeout_s=5, control_timeout_s=5, identity=router)
    try:
        yield client
    finally:
        await client.close()
        await worker.stop()


@pytest.mark.parametrize("roles", [["decode"], ["prefill", "decode"]])
def test_a_worker_with_a_certificate_of_its_role_is_believed(certificates: Certificates, roles: Sequence[str]) -> None:
    async def main() -> None:
        router = certificates.identity("router")
        async with asked(FakeDecode(), certificates.identity("w", roles=roles), router) as client:
            assert (await client.info()).role == "decode"
            request = decode_pb2.ReserveRequest(epoch="decode-0-1", kept_tokens_bound=1)
            assert (await client.reserve(request)).token

    run(main)


@pytest.mark.parametrize("roles", [["decode"], ["router"], []])
def test_a_worker_that_says_another_role_than_its_certificate_is_not(
    certificates: Certificates, roles: Sequence[str]
) -> None:
    async def main() -> None:
        router = certificates.identity("router")
        async with asked(FakePrefill(), certificates.identity("w", roles=roles), router) as client:
            for _ in range(2):
                with pytest.raises(UnavailableError) as caught:
                    await client.info()
                assert caught.value.reason == "WORKER_ROLE"

    run(main)


def test_the_certificate_is_looked_at_once_per_boot(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        router, worker = certificates.identity("router"), FakeDecode()
        looks: list[str] = []
        roles_at = router.roles_at

        async def looked(address: str, *, timeout_s: float) -> frozenset[str]:
            looks.append(address)
            return await roles_at(address, timeout_s=timeout_s)

        monkeypatch.setattr(router, "roles_at", looked)
        async with asked(worker, certificates.identity("decode"), router) as client:
            for _ in range(3):
                await client.info()
            assert len(looks) == 1
            worker.info.epoch = "another boot"
            await client.info()
            assert len(looks) == 2

    run(main)


def test_a_router_without_a_routers_certificate_is_refused_and_its_clients_are_not_blamed(
    certificates: Certificates,
) -> None:
    async def main() -> None:
        stranger = certificates.identity("client")
        async with asked(FakeDecode(), certificates.identity("decode"), stranger) as client:
            for call in (client.info(), client.reserve(decode_pb2.ReserveRequest()), client.release(b"t")):
                with pytest.raises(UnavailableError) as caught:
                    await call
                assert caught.value.reason == "WORKER_REFUSES"

    run(main)


def test_a_router_serves_with_the_workers_whose_roles_are_right(certificates: Certificates) -> None:
    """An impostor sees no prompt: it has a decode worker's certificate, and says that it computes prompts."""

    async def main() -> None:
        impostor, honest, decode = FakePrefill("impostor"), FakePrefill("honest"), FakeDecode()
        impostor.identity = decode.identity = certificates.identity("decode")
        honest.identity = certificates.identity("prefill")
        async with contextlib.AsyncExitStack() as stack:
            for worker in (impostor, honest, decode):
                await worker.start()
                stack.push_async_callback(worker.stop)
            files = certificates.files("router")
            router = Router(config_for([impostor, honest, decode], placement="round_robin", **settings(files)))
            await router.start()
            stack.push_async_callback(router.stop)
            trusted = grpc.ssl_channel_credentials(certificates.ca.read_bytes())
            channel = await stack.enter_async_context(grpc.aio.secure_channel(router.address, trusted))
            b = Bench(router, channel, [honest], [decode])
            await b.becomes(lambda: bool(router.table.served_models()))
            await impostor.polls.reaches(2)
            for _ in range(4):
                assert kinds(await b.answer())[-1] == "finished"
            assert router.table.unseen() == [impostor.address]
            assert (len(honest.requests), len(impostor.requests)) == (4, 0)
            await b.idle()

    run(main)


def test_a_router_can_demand_certificates_of_its_clients(certificates: Certificates) -> None:
    async def main() -> None:
        files = settings(certificates.files("router"))
        config = RouterConfig(registry="static://127.0.0.1:1", **files, demand_client_cert=True)
        router = Router(config)
        await router.start()
        ca = certificates.ca.read_bytes()
        for credentials, code in (
            (grpc.ssl_channel_credentials(ca), "UNAVAILABLE"),
            (certificates.channel("client"), "OK"),
        ):
            async with grpc.aio.secure_channel(router.address, credentials) as channel:
                assert await outcome(channel) == code
        await router.stop()

    async def outcome(channel: grpc.aio.Channel) -> str:
        try:
            await inference_pb2_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    run(main)
