import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest
from vlcache import AsyncClient, Client, DeadlineExceeded, InternalError, KVBytes, Model, Totals, Unavailable, Worker
from vlcache.v1 import inference_pb2 as pb

from tests.unit.client.conftest import FAST_RETRIES
from tests.unit.client.service import ScriptedService, fail, serve, whole_answer

MODEL = pb.Model(
    name="shapes-vlm",
    context_tokens=4096,
    max_images=16,
    policies=["vl_cache", "knorm"],
    default_policy="vl_cache",
    default_retention=0.1,
    kv_bytes_per_token=2048,
)


def test_models_are_typed(service, client):
    service.models = [[MODEL]]
    assert client.models() == (
        Model(
            name="shapes-vlm",
            context_tokens=4096,
            max_images=16,
            policies=("vl_cache", "knorm"),
            default_policy="vl_cache",
            default_retention=0.1,
            kv_bytes_per_token=2048,
        ),
    )


def test_info_is_typed(service, client):
    kv = pb.KVBytes(capacity=5, reserved=1, filling=2, active=3, retained=4)
    service.info = pb.GetServerInfoResponse(
        version="1.2.3",
        workers=[
            pb.Worker(
                name="d0",
                role="decode",
                address="h:1",
                state="ready",
                model="m",
                requests_running=6,
                requests_waiting=7,
                kv=kv,
            )
        ],
        totals=pb.Totals(requests=9, kv_full_bytes=1000, kv_kept_bytes=100, kv_sent_bytes=110),
    )
    info = client.info()
    assert info.version == "1.2.3"
    assert info.workers == (
        Worker(
            name="d0",
            role="decode",
            address="h:1",
            state="ready",
            model="m",
            requests_running=6,
            requests_waiting=7,
            kv=KVBytes(capacity=5, reserved=1, filling=2, active=3, retained=4),
        ),
    )
    assert info.totals == Totals(requests=9, kv_full_bytes=1000, kv_kept_bytes=100, kv_sent_bytes=110)
    assert info.totals.kv_saved_bytes == 900


def test_unary_calls_are_retried_and_then_fail(service, client):
    service.models = [grpc.StatusCode.UNAVAILABLE, [MODEL]]
    assert client.models()[0].name == "shapes-vlm"
    service.models = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(Unavailable):
        client.models()
    service.models = [grpc.StatusCode.UNIMPLEMENTED, [MODEL]]
    with pytest.raises(InternalError) as caught:
        client.models()
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_wait_ready_waits_for_a_model(service, client):
    service.models = [grpc.StatusCode.UNAVAILABLE, [], [MODEL]]
    client.wait_ready(5)
    assert len(service.models) == 1


def test_wait_ready_tells_what_it_saw_last(service, client):
    service.models = [[]]
    with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.3 s: the service has no model"):
        client.wait_ready(0.3)
    service.models = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(DeadlineExceeded, match=r"within 0\.3 s: no"):
        client.wait_ready(0.3)


def test_wait_ready_does_not_wait_when_it_cannot_help(service, client):
    service.models = [grpc.StatusCode.UNAUTHENTICATED]
    began = time.monotonic()
    with pytest.raises(Exception, match="UNAUTHENTICATED"):
        client.wait_ready(10)
    assert time.monotonic() - began < 5


def test_wait_ready_finds_a_service_that_starts_later():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    service, servers = ScriptedService(), []
    service.models = [[MODEL]]
    starter = threading.Timer(0.5, lambda: servers.append(serve(service, address)))
    starter.start()
    try:
        with Client(address) as client:
            client.wait_ready(10)
    finally:
        starter.join()
        servers[0].stop(grace=None).wait()


@pytest.mark.parametrize("made", [Client, AsyncClient])
@pytest.mark.parametrize("tenant", ["", "a b", "x" * 65, "team/a", "a\n", "é"])
def test_a_wrong_tenant_is_refused_before_anything_is_opened(made, tenant):
    with pytest.raises(ValueError, match="tenant"):
        made(tenant=tenant)


def test_every_attempt_of_a_client_is_its_tenants(service):
    service.attempts = [[fail(grpc.StatusCode.UNAVAILABLE)], whole_answer()]
    with Client(service.address, tenant="Team-1._", retry=FAST_RETRIES) as client:
        client.generate("?", priority=100)
    assert service.tenants == ["Team-1._"] * 2
    assert [request.priority for request in service.requests] == [100, 100]


def test_importing_the_client_pulls_in_nothing_heavy():
    code = (
        "import sys, vlcache, vlcache.cli;"
        "print(*sorted({'torch', 'numpy', 'PIL', 'transformers', 'shared'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""
