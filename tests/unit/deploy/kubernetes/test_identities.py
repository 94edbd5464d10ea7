"""Who a Pod is: the names that others check, and the Secrets that prove them."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.rpc.server import LIVE, SERVING, RpcServer
from tests.certificates import Certificates
from tests.unit.deploy.kubernetes.manifests import FIELDS, SECURED, Container, rendered

PAGE = Path(__file__).parents[4] / "docs" / "kubernetes.md"
TLS_FILES = {"--tls-cert": "tls.crt", "--tls-key": "tls.key", "--tls-ca": "ca.crt"}


def secret_at(container: Container, folder: str) -> dict[str, object]:
    """The Secret that is mounted there, read-only."""
    (mount,) = (each for each in container.spec["volumeMounts"] if each["mountPath"] == folder)
    assert mount["readOnly"] is True
    (volume,) = (each for each in container.pod["volumes"] if each["name"] == mount["name"])
    return volume["secret"]


def flags_of(container: Container) -> dict[str, str]:
    return dict(each.split("=", 1) for each in container.spec["args"])


def test_every_service_shows_a_certificate_of_its_own_role() -> None:
    for container in rendered(SECURED).services:
        flags = flags_of(container)
        folders = {flags[flag].removesuffix(f"/{file}") for flag, file in TLS_FILES.items()}
        (folder,) = folders
        secret = secret_at(container, folder)
        assert secret["secretName"] == f"vlcache-{container.spec['name']}-tls"
        # the group's, and nobody else's
        assert secret["defaultMode"] == 0o440
        assert container.pod["securityContext"]["fsGroup"] == container.pod["securityContext"]["runAsGroup"]


def test_workers_are_reached_at_names_that_a_certificate_can_have() -> None:
    everything = rendered(SECURED)
    services = {each["metadata"]["name"]: each for each in everything.all("Service")}
    sets = {each["metadata"]["name"]: each for each in everything.all("StatefulSet")}
    assert sets.keys() == {"prefill", "decode"}
    for container in everything.services:
        if (name := container.deployment["metadata"]["name"]) not in sets:
            continue
        service = services[container.deployment["spec"]["serviceName"]]
        # before a Pod is ready as well: it is in the registry when it is
        assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
        domain = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
        # a variable knows those before it
        assert container.environment["ADDRESS"] == f"{FIELDS['metadata.name']}.{domain}"
        assert flags_of(container)["--advertise"] == f"$(ADDRESS):{container.ports['grpc']}"
        assert f"| `vlcache-{name}-tls` | `spiffe://vlcache/{name}` | `*.{domain}` |" in PAGE.read_text()


@pytest.mark.parametrize(("service", "met"), [("prefill", True), ("decode", False)])
def test_a_wildcard_names_the_workers_of_one_service(tmp_path: Path, service: str, met: bool) -> None:
    async def main() -> None:
        certificates = Certificates(tmp_path)
        worker = certificates.identity("prefill", hosts=["*.prefill.vlcache.svc"])
        server = await RpcServer.start(
            name="p",
            host="127.0.0.1",
            port=0,
            register=lambda server: None,
            services=[],
            credentials=worker.server_credentials(demand_client_cert=True),
        )
        # what a name server would say of prefill-0.prefill.vlcache.svc
        options = [("grpc.ssl_target_name_override", f"{service}-0.{service}.vlcache.svc")]
        async with grpc.aio.secure_channel(server.address, certificates.channel("router"), options=options) as channel:
            call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=LIVE), timeout=10)
            if met:
                assert (await call).status == SERVING
            else:
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await call
        await server.stop(0)

    asyncio.run(main())


def test_no_probe_speaks_grpc_to_a_port_that_wants_tls() -> None:
    for container in rendered(SECURED).services:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.spec[kind]
            assert "grpc" not in probe
            assert probe["tcpSocket"]["port"] in container.ports


def test_routers_read_tokens_from_their_secret() -> None:
    (router,) = (each for each in rendered(SECURED).services if each.name == "router/router")
    file = Path(flags_of(router)["--api-tokens"])
    secret = secret_at(router, str(file.parent))
    page = PAGE.read_text()
    assert f"the file `{file.name}` of the Secret `{secret['secretName']}`" in page
    assert set(re.findall(r"`(vlcache-\w+-tls)`", page)) == {
        f"vlcache-{role}-tls" for role in ("router", "prefill", "decode")
    }
