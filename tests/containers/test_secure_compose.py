"""The compose file with deploy/docker/secure.yml over it: TLS from end to end, and nothing without a token."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from models.shapes_vlm.paths import SAMPLES
from tests.containers.compose import Compose
from tests.containers.machine import Machine

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

ROUTER = "127.0.0.1:50051"
# router, prefill, decode, redis, prometheus
CONTAINERS = 5
USER = 10001
CLI = (sys.executable, "-m", "vlcache.cli")
QUESTION = ("ask", "--json", "--address", ROUTER, "--image", str(SAMPLES / "scene_3.png"), "Read the purple plate.")
PROBE = ("python", "-m", "shared.rpc.probe")


class Secured(NamedTuple):
    compose: Compose
    ca: Path
    token: str


@pytest.fixture(scope="module")
def secured(machine: Machine, images: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """As docs/security.md has it."""
    folder = tmp_path_factory.mktemp("operator")
    certs, tokens = folder / "certs", folder / "tokens.txt"
    machine.run(*CLI, "certs", str(certs), "--hosts", "router", "prefill", "decode", "localhost", "127.0.0.1")
    token = machine.run("sh", "-c", f"{sys.executable} -m vlcache.cli token team-a 2>>{tokens}").strip()
    for role in ("router", "prefill", "decode"):
        os.chown(certs / f"{role}.key", USER, -1)
    machine.cut_off()
    files = {"CERTS": str(certs), "TOKENS": str(tokens)}
    compose = Compose(machine, "deploy/docker/secure.yml", more=files)
    compose.up()
    # the health checks speak TLS
    compose.wait_healthy(CONTAINERS)
    yield Secured(compose, certs / "ca.pem", token)
    compose.down()


def test_who_knows_the_ca_and_has_a_token_is_answered(machine: Machine, secured: Secured) -> None:
    answer = json.loads(
        machine.run(*CLI, *QUESTION, "--ca-file", str(secured.ca), more={"VLCACHE_TOKEN": secured.token})
    )
    assert answer["text"]
    assert answer["transfer"]["transport"] == "memory"


def test_nobody_else_is(machine: Machine, secured: Secured) -> None:
    with pytest.raises(AssertionError, match="UNAUTHENTICATED"):
        machine.run(*CLI, *QUESTION, "--ca-file", str(secured.ca))
    with pytest.raises(AssertionError, match="UNAVAILABLE"):
        machine.run(*CLI, *QUESTION)


@pytest.mark.parametrize("service", ["router", "prefill", "decode"])
def test_a_container_shows_others_its_certificate_and_sees_its_own_key_alone(
    machine: Machine, secured: Secured, service: str
) -> None:
    (container,) = secured.compose.containers(service)
    with pytest.raises(AssertionError, match="UNAVAILABLE"):
        machine.podman("exec", container, *PROBE)
    tls = ["--tls-cert=/run/tls/cert.pem", "--tls-key=/run/tls/key.pem", "--tls-ca=/run/tls/ca.pem"]
    assert machine.podman("exec", container, *PROBE, *tls) == ""
    # by the name at which they call each other
    assert machine.podman("exec", container, *PROBE, *tls, "--address=prefill:50051") == ""
    keys = machine.podman("exec", container, "find", "/run/tls", "-name", "*.key*", "-o", "-name", "key*")
    assert keys.split() == ["/run/tls/key.pem"]
