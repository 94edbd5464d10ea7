"""The Deployments of the manifests as `podman kube play` runs them.

Podman starts Pods with their users, file systems, volumes, ConfigMaps and Secrets. Done here is what it does not do:

- it has no Services: Pods get fixed addresses, and find Redis by a host alias;
- it knows no Pod's address beforehand, and replaces no $(NAME) in arguments;
- it publishes every containerPort on the machine, so there are none;
- emptyDirs of one name are one volume for all Pods, so each has its Deployment's name in front.

It ignores gRPC probes, which the tests ask themselves, preStop, affinities and the medium of an emptyDir.
NetworkPolicies, budgets and scalers are not for it.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import secrets
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.containers.machine import Machine
from tests.unit.deploy.kubernetes.manifests import Container, Manifest, Rendered, rendered

NETWORK, SUBNET = "vlcache-play", "10.89.77"
SECRET = "vlcache-redis"
# How the images that were built are called in the manifests.
IMAGES = {"redis": "vlcache/redis-debian"}
START_S = 60.0
STOP_S = 60.0


class Play:
    """Use as a context manager: every Deployment of an overlay with one Pod."""

    def __init__(self, machine: Machine, shape: str) -> None:
        self._machine = machine
        self._rendered = rendered(shape)
        # .1 is the bridge
        names = [deployment["metadata"]["name"] for deployment in self._rendered.all("Deployment")]
        self.addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(names, start=10)}
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Play:
        with contextlib.ExitStack() as exits:
            self._folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="vlcache-play-")))
            self._machine.podman("network", "create", "--subnet", f"{SUBNET}.0/24", NETWORK)
            exits.callback(self._machine.podman, "network", "rm", "--force", NETWORK)
            self._create_secret()
            exits.callback(self._machine.podman, "secret", "rm", SECRET)
            self._tag_images()
            for deployment in self._rendered.all("Deployment"):
                exits.callback(self._machine.podman, "pod", "rm", "--force", "--ignore", pod_of(deployment))
                self._start(deployment)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    @property
    def services(self) -> list[Container]:
        """The containers that run our code."""
        return self._rendered.services

    @property
    def router(self) -> str:
        """Where a client on the bridge reaches it."""
        (port,) = (each.ports["grpc"] for each in self.services if each.name == "router/router")
        return f"{self.addresses['router']}:{port}"

    def address_of(self, container: Container) -> str:
        return self.addresses[container.deployment["metadata"]["name"]]

    def inspect(self, container: Container) -> dict[str, Any]:
        """What Podman knows of a container."""
        return self._machine.inspect(f"{pod_of(container.deployment)}-{container.spec['name']}")

    def log_of(self, container: Container) -> str:
        return self._machine.podman("logs", f"{pod_of(container.deployment)}-{container.spec['name']}")

    def stop(self, name: str) -> None:
        """SIGTERM for a Deployment's Pod, and the time that the manifest gives it."""
        deployment = self._rendered.named("Deployment", name)
        grace_s = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        self._machine.podman("pod", "stop", f"--time={grace_s}", pod_of(deployment), timeout_s=STOP_S)

    def _create_secret(self) -> None:
        passwords = {f"{user}-password": secrets.token_hex(16) for user in ("worker", "router")}
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in passwords.items()}
        (self._folder / "secret.json").write_text(json.dumps(encoded))
        self._machine.podman("secret", "create", SECRET, str(self._folder / "secret.json"))

    def _tag_images(self) -> None:
        for image in {container.spec["image"] for container in self._rendered.containers}:
            name = image.rpartition(":")[0]
            self._machine.podman("tag", IMAGES.get(name, name), f"localhost/{image}")

    def _start(self, deployment: Manifest) -> None:
        name = deployment["metadata"]["name"]
        file = self._folder / f"{name}.yaml"
        documents = [*self._rendered.all("ConfigMap"), playable(self._rendered, deployment, self.addresses)]
        file.write_text(yaml.safe_dump_all(documents))
        command = ["kube", "play", f"--network={NETWORK}", f"--ip={self.addresses[name]}", str(file)]
        self._machine.podman(*command, timeout_s=START_S)


def pod_of(deployment: Manifest) -> str:
    """As Podman calls the first Pod of a Deployment."""
    return f"{deployment['metadata']['name']}-pod-0"


def playable(everything: Rendered, deployment: Manifest, addresses: dict[str, str]) -> Manifest:
    """A Deployment with what Podman does not do done: one Pod, addresses, arguments, no published ports."""
    name = deployment["metadata"]["name"]
    changed = copy.deepcopy(deployment)
    changed["spec"]["replicas"] = 1
    pod = changed["spec"]["template"]["spec"]
    pod["hostAliases"] = [{"ip": addresses["redis"], "hostnames": ["redis"]}]
    own = [each for each in everything.containers if each.deployment is deployment]
    for spec, container in zip(pod["containers"], own, strict=True):
        known = {**container.environment, "POD_NAME": pod_of(deployment), "ADDRESS": addresses[name]}
        spec["args"] = Container(deployment, container.spec, known).arguments
        spec["env"] = [each for each in spec["env"] if each["name"] != "ADDRESS"]
        del spec["ports"]
    for volume in (
        *pod.get("volumes", []),
        *(each for spec in pod["containers"] for each in spec.get("volumeMounts", [])),
    ):
        volume["name"] = f"{name}-{volume['name']}"
    return changed
