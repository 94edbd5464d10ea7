"""Whatever the manifests tell our processes, the processes understand."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from decode_worker.config import DecodeConfig
from deploy.local.stack import STOP_MARGIN_S
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from shared.command_line import parse_config
from shared.config import WorkerConfig
from shared.registry.redis_client import PASSWORD_VARIABLE, RedisLocation
from shared.rpc.server import LIVE
from shared.version import VERSION
from tests.certificates import Certificates
from tests.unit.deploy import dockerfile
from tests.unit.deploy.kubernetes.manifests import (
    FIELDS,
    REFERENCE,
    Container,
    cpus,
    each_plain_shape,
    each_shape,
    mib,
    rendered,
)

CONFIGS: dict[str, type[RouterConfig | PrefillConfig | DecodeConfig]] = {
    "vlcache/router": RouterConfig,
    "vlcache/prefill": PrefillConfig,
    "vlcache/decode": DecodeConfig,
}
TRITON_CACHE = "TRITON_CACHE_DIR"


# Where components mount Secrets.
TLS_FOLDER, TOKENS = "/etc/vlcache/tls", "/etc/vlcache/api-tokens/tokens"


@pytest.fixture(scope="module")
def secrets_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The files of a role's Secrets, by where its arguments say that they are."""
    folder = tmp_path_factory.mktemp("secrets")
    certificates = Certificates(folder)
    (folder / "tokens").write_text(f"team-a {hashlib.sha256(b'token').hexdigest()}\n")

    def files_of(role: str) -> dict[str, str]:
        tls = certificates.files(role)
        names = {"tls.crt": tls.cert, "tls.key": tls.key, "ca.crt": tls.ca}
        return {f"{TLS_FOLDER}/{name}": str(path) for name, path in names.items()} | {TOKENS: str(folder / "tokens")}

    return files_of


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, secrets_of: Callable[[str], dict[str, str]]):
    """The configuration of a container, read as its process reads it, Secrets included."""

    def read(container: Container) -> RouterConfig | PrefillConfig | DecodeConfig:
        files = secrets_of(container.spec["name"])
        arguments = [each.partition("=") for each in container.arguments]
        words = [f"{flag}{equals}{files.get(value, value)}" for flag, equals, value in arguments]
        monkeypatch.setattr(sys, "argv", [container.name, *words])
        return parse_config(CONFIGS[container.image], "")

    return read


@each_shape
def test_every_argument_is_understood(shape: str, parse) -> None:
    services = rendered(shape).services
    assert {container.image for container in services} == CONFIGS.keys()
    for container in services:
        assert not REFERENCE.findall(" ".join(container.arguments)), "a variable is not defined"
        config = parse(container)
        assert config.name.startswith(FIELDS["metadata.name"])
    names = [parse(container).name for container in services if "pair" in container.name]
    assert len(set(names)) == len(names), "two workers of one Pod are told apart"


@each_shape
def test_processes_listen_where_the_manifests_say(shape: str, parse) -> None:
    for container in rendered(shape).services:
        config = parse(container)
        ports = container.ports
        assert config.host == "0.0.0.0"
        http = {config.http_port} if isinstance(config, RouterConfig) and config.http_port is not None else set()
        assert set(ports.values()) == {config.port, config.metrics_port, *http}
        assert {name for name, port in ports.items() if port == config.metrics_port} <= {
            "metrics",
            "decode-metrics",
        }
        if isinstance(config, WorkerConfig):
            assert config.advertise == f"{container.environment['ADDRESS']}:{config.port}"
        # one or the other, never neither
        assert config.allow_plaintext == (config.identity() is None)


@each_plain_shape
def test_probes_ask_what_health_answers(shape: str, parse) -> None:
    for container in rendered(shape).services:
        port = parse(container).port
        spec = container.spec
        assert spec["readinessProbe"]["grpc"] == {"port": port}
        # what restarts a process asks whether it lives: a router without workers must not be restarted
        assert spec["livenessProbe"]["grpc"] == spec["startupProbe"]["grpc"] == {"port": port, "service": LIVE}


@each_shape
def test_a_pod_has_the_time_to_drain(shape: str, parse) -> None:
    for container in rendered(shape).services:
        before = container.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        grace_s = container.pod["terminationGracePeriodSeconds"]
        assert grace_s >= before + parse(container).drain_s + STOP_MARGIN_S, container.name


@each_shape
def test_workers_and_routers_meet_in_one_registry(shape: str, parse) -> None:
    everything = rendered(shape)
    places, users = set(), {}
    for container in everything.services:
        location = RedisLocation.parse(parse(container).registry)
        places.add((location.host, location.port, location.db, location.prefix))
        users[container.spec["name"]] = location.username
        (password,) = (each for each in container.spec["env"] if each["name"] == PASSWORD_VARIABLE)
        assert password["valueFrom"]["secretKeyRef"]["key"] == f"{location.username}-password"
    ((host, port, _, _),) = places
    assert everything.named("Service", host)["spec"]["ports"][0]["port"] == port
    assert users == {"router": "router", "prefill": "worker", "decode": "worker"}


@each_shape
def test_workers_are_told_the_same_model(shape: str, parse) -> None:
    workers = [parse(each) for each in rendered(shape).services if each.image != "vlcache/router"]
    assert len({(config.model, config.revision, config.served_model_name, config.dtype) for config in workers}) == 1
    assert len(workers) == 2


def test_the_bundled_model_lies_where_the_images_have_it(parse) -> None:
    for container in rendered("cpu").services:
        if isinstance(config := parse(container), WorkerConfig):
            (folder,) = dockerfile.of(container.spec["name"], "WORKDIR")
            copied = dict(each.split() for each in dockerfile.of(container.spec["name"], "COPY") if "--" not in each)
            assert config.model == f"{folder}/{copied['models/shapes_vlm/checkpoint']}"


@each_shape
def test_memory_and_threads_fit_their_containers(shape: str, parse) -> None:
    for container in rendered(shape).services:
        config, resources = parse(container), container.spec["resources"]
        limit = mib(resources["limits"]["memory"])
        assert mib(resources["requests"]["memory"]) <= limit
        if isinstance(config, RouterConfig):
            assert config.max_waiting_mib < limit
        elif isinstance(config, PrefillConfig):
            assert config.arena_mib + config.preprocess_processes * config.preprocess_memory_mib < limit
        else:
            assert config.device != "cpu" or config.kv_memory_mib < limit / 2
        if isinstance(config, WorkerConfig):
            assert config.threads == cpus(resources["requests"]["cpu"])
            assert (config.device == "cpu") == ("nvidia.com/gpu" not in resources["limits"])


@each_shape
def test_sockets_of_arenas_lie_where_a_worker_may_write(shape: str, parse) -> None:
    """A folder that does not exist yet, in a volume: the worker makes it, private; decode workers have it as well."""
    for container in rendered(shape).services:
        config = parse(container)
        if not isinstance(config, PrefillConfig):
            continue
        mounts = mounted(container)
        (volume,) = (name for path, name in mounts.items() if config.socket_dir.parent == path)
        assert any(each["name"] == volume and "emptyDir" in each for each in container.pod["volumes"])
        for other in rendered(shape).services:
            if other.deployment is container.deployment:
                assert mounted(other)[config.socket_dir.parent] == volume
                assert "runAsUser" not in other.spec["securityContext"]


def mounted(container: Container) -> dict[Path, str]:
    """Volumes by where they are mounted."""
    return {Path(each["mountPath"]): each["name"] for each in container.spec.get("volumeMounts", [])}


@each_shape
def test_every_volume_is_mounted_and_every_mount_has_a_volume(shape: str) -> None:
    everything = rendered(shape)
    for deployment in everything.workloads:
        volumes = {each["name"] for each in deployment["spec"]["template"]["spec"].get("volumes", [])}
        mounts = [mounted(each) for each in everything.containers if each.deployment is deployment]
        assert {name for each in mounts for name in each.values()} == volumes


@each_shape
def test_every_variable_has_a_reader(shape: str) -> None:
    read_by_code = {PASSWORD_VARIABLE, TRITON_CACHE}
    readers: set[str] = set()
    for container in rendered(shape).services:
        named = {each["name"] for each in container.spec["env"]}
        used = set(REFERENCE.findall(" ".join(container.spec["args"])))
        assert named <= used | read_by_code, container.name
        readers |= used
    (shared,) = (each for each in rendered(shape).all("ConfigMap"))
    assert shared["data"].keys() <= readers


def test_triton_knows_its_variable() -> None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("there is no triton")
    assert f'"{TRITON_CACHE}"' in Path(spec.origin).with_name("knobs.py").read_text()


@each_shape
def test_images_are_those_of_this_version(shape: str) -> None:
    for container in rendered(shape).services:
        tag = container.spec["image"].rpartition(":")[2]
        gpu = "nvidia.com/gpu" in container.spec["resources"]["limits"]
        assert tag == (f"{VERSION}-gpu" if gpu else VERSION)


@each_shape
def test_no_container_may_do_more_than_serve(shape: str) -> None:
    for container in rendered(shape).containers:
        pod, own = container.pod["securityContext"], container.spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] == pod["runAsGroup"] == 10001
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container.pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & container.pod.keys()
        assert not [each for each in container.pod.get("volumes", []) if "hostPath" in each]
