"""The Deployments of deploy/kubernetes as real Pods: overlays for CPUs come up, answer, and leave in good order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from models.shapes_vlm.paths import SAMPLES
from tests.containers.compose import wait_until
from tests.containers.kube_play import Play
from tests.containers.machine import Machine

# whichever test comes first builds the images
pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]

# How a parcel goes from one Pod to another, and within one.
TRANSPORTS = {"cpu": "grpc", "same-node": "memory"}
# What the kubelet does: HOST:PORT and the name of a service.
PROBE = """
import sys, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(sys.argv[1]))
sys.exit(stub.Check(health_pb2.HealthCheckRequest(service=sys.argv[2]), timeout=2).status != 1)
"""


@pytest.fixture(scope="module", params=TRANSPORTS)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def play(machine: Machine, images: object, shape: str) -> Iterator[Play]:
    """All Pods of an overlay, when every probe of theirs succeeds."""
    with Play(machine, shape) as playing:
        for container in playing.services:
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container.spec[kind]["grpc"]
                probe = [f"{playing.address_of(container)}:{asked['port']}", asked.get("service", "")]
                wait_until(
                    lambda probe=probe: machine.succeeds(sys.executable, "-c", PROBE, *probe),
                    f"{kind} of {container.name} fails: {playing.log_of(container)}",
                )
        yield playing


def client(machine: Machine, *arguments: str) -> dict[str, object]:
    """What the client prints."""
    return json.loads(machine.run(sys.executable, "-m", "vlcache.cli", *arguments, "--json"))


def test_every_worker_is_seen_at_its_pod(machine: Machine, play: Play) -> None:
    workers = client(machine, "status", "--address", play.router)["workers"]
    wanted = sorted(container.spec["name"] for container in play.services if container.spec["name"] != "router")
    assert sorted(worker["role"] for worker in workers) == wanted
    assert {worker["state"] for worker in workers} == {"ready"}


def test_a_question_about_an_image_is_answered(machine: Machine, play: Play, shape: str) -> None:
    image = str(SAMPLES / "scene_1.png")
    answer = client(machine, "ask", "--address", play.router, "--image", image, "What is it?")
    assert answer["text"]
    assert answer["transfer"]["transport"] == TRANSPORTS[shape]
    assert answer["compression"]["kept_bytes"] < answer["compression"]["full_bytes"] / 4


def test_containers_are_as_confined_as_the_manifests_say(play: Play) -> None:
    for container in play.services:
        known = play.inspect(container)
        assert known["Config"]["User"] == "10001:10001"
        assert known["HostConfig"]["ReadonlyRootfs"] is True
        assert not known["EffectiveCaps"]
        assert "no-new-privileges" in known["HostConfig"]["SecurityOpt"]


def test_every_pod_drains_within_its_grace(play: Play) -> None:
    """The last test: nothing runs afterwards."""
    for name in sorted(play.addresses.keys() - {"redis"}, key=lambda name: name != "router"):
        play.stop(name)
    assert {each.name: play.inspect(each)["State"]["ExitCode"] for each in play.services} == {
        each.name: 0 for each in play.services
    }
