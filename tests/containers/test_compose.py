"""The images of deploy/docker under the compose file, as real containers: asked, hurt, watched and taken down."""

from __future__ import annotations

import json
import sys
import urllib.parse

import pytest

from models.shapes_vlm.paths import SAMPLES
from tests.containers.asking import UNDER_WAY
from tests.containers.compose import Compose, wait_until
from tests.containers.conftest import CONTAINERS
from tests.containers.machine import Machine

# whichever test comes first builds the images
pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]

ROUTER = "127.0.0.1:50051"
PROMETHEUS = "http://127.0.0.1:9090"
SERVICES = ("router", "prefill", "decode")
HEAVY = ("torch", "transformers", "numpy", "PIL", "tokenizers", "safetensors", "av")
FIND = "import importlib.util, json, sys; print(json.dumps([n for n in sys.argv[1:] if importlib.util.find_spec(n)]))"
FETCH = "import sys, urllib.request; sys.stdout.write(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"


def in_image(machine: Machine, service: str, *command: str) -> str:
    """What a command prints in a new container without a network."""
    entry, *arguments = command
    options = ["--rm", "--network=none", "--read-only", "--cap-drop=ALL", f"--entrypoint={entry}"]
    return machine.podman("run", *options, f"vlcache/{service}", *arguments)


def query(machine: Machine, expr: str) -> dict[str, float]:
    """The values of an instant vector by what their `role` is."""
    url = f"{PROMETHEUS}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
    found = json.loads(machine.run(sys.executable, "-c", FETCH, url))["data"]["result"]
    return {each["metric"].get("role", ""): float(each["value"][1]) for each in found}


def workers(machine: Machine) -> dict[str, str]:
    """Name and state of every worker that the router sees."""
    status = machine.run(sys.executable, "-m", "vlcache.cli", "status", "--json", "--address", ROUTER)
    return {worker["name"]: worker["state"] for worker in json.loads(status)["workers"]}


@pytest.mark.parametrize(
    ("service", "installed"),
    [
        ("router", []),
        ("prefill", ["torch", "transformers", "numpy", "PIL", "tokenizers", "safetensors", "av"]),
        ("decode", ["torch", "transformers", "numpy", "PIL", "tokenizers", "safetensors"]),
    ],
)
@pytest.mark.usefixtures("images")
def test_an_image_holds_what_its_service_needs(machine: Machine, service: str, installed: list[str]) -> None:
    assert json.loads(in_image(machine, service, "python", "-c", FIND, *HEAVY)) == installed
    folders = set(in_image(machine, service, "ls", "/app").split())
    own = {"router": "router", "prefill": "prefill_worker", "decode": "decode_worker"}[service]
    model = [] if service == "router" else ["models"]
    assert folders == {"client", "pyproject.toml", "shared", own, *model}


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize("service", ["prefill", "decode"])
def test_the_native_kernels_were_compiled_for_the_image(machine: Machine, service: str) -> None:
    load = "from shared.kernels.native.library import slab_attention_function as f; print(f() is not None)"
    assert in_image(machine, service, "python", "-c", load) == "True\n"


def test_containers_may_do_next_to_nothing(machine: Machine, service: Compose) -> None:
    for name in SERVICES:
        for container in service.containers(name):
            status = machine.podman("exec", container, "cat", "/proc/1/status", "/proc/self/status")
            assert status.count("CapEff:\t0000000000000000") == status.count("CapBnd:\t0000000000000000") == 2
            assert status.count("Uid:\t10001\t10001\t10001\t10001") == 2
            assert status.count("NoNewPrivs:\t1") == 2
            root = machine.podman("exec", container, "cat", "/proc/mounts").split("\n")[0].split()
            assert root[1] == "/"
            assert root[3].split(",")[0] == "ro"


def test_a_parcel_crosses_containers_in_shared_memory(machine: Machine, service: Compose) -> None:
    before = query(machine, 'sum by (role) (vlcache_kv_transfer_bytes_total{transport="memory"})')
    question = ["ask", "--json", "--image", str(SAMPLES / "scene_3.png"), "Read the purple plate."]
    answer = json.loads(machine.run(sys.executable, "-m", "vlcache.cli", *question, "--address", ROUTER))
    assert answer["text"]
    assert answer["transfer"]["transport"] == "memory"
    sent = answer["transfer"]["sent_bytes"]
    wait_until(
        lambda: (
            query(machine, 'sum by (role) (vlcache_kv_transfer_bytes_total{transport="memory"})').get("prefill", 0)
            >= before.get("prefill", 0) + sent
            > before.get("prefill", 0)
        ),
        "Prometheus has not seen the transfer",
    )


def test_prometheus_scrapes_every_replica(machine: Machine, service: Compose) -> None:
    wait_until(
        lambda: query(machine, "count by (role) (vlcache_build_info)") == {"router": 1, "prefill": 1, "decode": 2},
        "Prometheus does not see every process",
    )
    assert query(machine, 'sum (up{job="vlcache"})') == {"": 4}


def test_answers_survive_a_container_that_dies_and_it_comes_back(machine: Machine, service: Compose) -> None:
    wait_until(lambda: sorted(workers(machine).values()) == ["ready"] * 3, "the router does not see three workers")
    hosts = {machine.inspect(container)["Config"]["Hostname"]: container for container in service.containers("decode")}
    pids = {host: str(machine.inspect(container)["State"]["Pid"]) for host, container in hosts.items()}
    asking = machine.start(sys.executable, "-m", "tests.containers.asking", ROUTER)
    try:
        assert asking.stdout is not None
        assert asking.stdout.readline().strip() == UNDER_WAY
        victim, survivor = hosts
        machine.run("kill", "-KILL", pids[victim])
        said, _ = asking.communicate(timeout=120)
    finally:
        asking.kill()
    assert asking.returncode == 0
    answers = json.loads(said)
    assert {answer["decode"] for answer in answers} == {f"decode-{survivor}"}
    assert {transport for answer in answers for transport in answer["transports"]} == {"memory"}
    # its restart policy brings it back under the same name
    service.wait_healthy(CONTAINERS)
    wait_until(lambda: workers(machine).get(f"decode-{victim}") == "ready", "the container's worker has not come back")


def test_everything_drains_and_nothing_is_left(machine: Machine, service: Compose) -> None:
    """The last one: it takes the service down."""
    names = [service.name(container) for container in service.containers()]
    service.stop()
    states = [(name, machine.inspect(name)["State"]) for name in names]
    ended = [(name, state["Status"], state["ExitCode"]) for name, state in states]
    assert ended == [(name, "exited", 0) for name in names]
    service.down()
    assert service.containers() == []
    assert machine.podman("volume", "ls", "--quiet") == ""
    assert machine.podman("network", "ls", "--quiet").split() == ["podman"]
