"""The manifests as `kubectl kustomize` renders them, and what Kubernetes would make of them."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[4] / "deploy" / "kubernetes"
COMPONENTS = sorted(folder.name for folder in (FOLDER / "components").iterdir())
# What is rendered: every overlay, and the base with all components, once without and once with identities.
EVERYTHING, SECURED = "everything", "secured"
IDENTITIES = ("api-tokens", "certificates")
PLAIN_SHAPES = [*sorted(folder.name for folder in (FOLDER / "overlays").iterdir()), EVERYTHING]
SHAPES = [*PLAIN_SHAPES, SECURED]

# What the kubelet would say of a Pod.
FIELDS = {"metadata.name": "pod-0", "status.podIP": "10.0.0.1"}
SECRET = "0123456789abcdef"
REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")

Manifest = dict[str, Any]
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_plain_shape = pytest.mark.parametrize("shape", PLAIN_SHAPES)


def kustomize(folder: Path) -> list[Manifest]:
    """What `kubectl` makes of a kustomization."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def kustomization(resources: Sequence[str], components: Sequence[str]) -> list[Manifest]:
    """Rendered from folders below `deploy/kubernetes`, as an overlay of a user's own would be."""
    with tempfile.TemporaryDirectory() as folder:
        # kustomize takes no absolute paths
        up = os.path.relpath(FOLDER, os.path.realpath(folder))
        paths = {
            "resources": [f"{up}/{each}" for each in resources],
            "components": [f"{up}/components/{each}" for each in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(paths))
        return kustomize(Path(folder))


@dataclass(frozen=True)
class Container:
    """One container of a Deployment or StatefulSet, and its Pod."""

    deployment: Manifest
    spec: Manifest
    environment: Mapping[str, str]

    @property
    def pod(self) -> Manifest:
        return self.deployment["spec"]["template"]["spec"]

    @property
    def name(self) -> str:
        return f"{self.deployment['metadata']['name']}/{self.spec['name']}"

    @property
    def image(self) -> str:
        """Without its tag."""
        return self.spec["image"].rpartition(":")[0]

    @property
    def arguments(self) -> list[str]:
        """As the process gets them: what is not defined stays as it is."""
        return [expanded(each, self.environment) for each in self.spec["args"]]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.spec["ports"]}


@dataclass(frozen=True)
class Rendered:
    """The resources of one shape."""

    resources: tuple[Manifest, ...]

    def all(self, kind: str) -> list[Manifest]:
        return [each for each in self.resources if each["kind"] == kind]

    def named(self, kind: str, name: str) -> Manifest:
        (found,) = (each for each in self.all(kind) if each["metadata"]["name"] == name)
        return found

    @property
    def workloads(self) -> list[Manifest]:
        """What makes Pods."""
        return [*self.all("Deployment"), *self.all("StatefulSet")]

    @property
    def containers(self) -> list[Container]:
        """Of all workloads."""
        return [
            Container(deployment, spec, self._environment(spec))
            for deployment in self.workloads
            for spec in deployment["spec"]["template"]["spec"]["containers"]
        ]

    @property
    def services(self) -> list[Container]:
        """Those that run our code."""
        return [each for each in self.containers if each.image.startswith("vlcache/")]

    @property
    def pods(self) -> dict[str, dict[str, str]]:
        """Labels of the Pods of each workload."""
        return {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in self.workloads}

    def _environment(self, spec: Manifest) -> dict[str, str]:
        environment: dict[str, str] = {}
        for source in spec.get("envFrom", []):
            environment.update(self.named("ConfigMap", source["configMapRef"]["name"])["data"])
        for each in spec.get("env", []):
            environment[each["name"]] = expanded(_value(each, spec), environment)
        return environment


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """With the value of every $(NAME) that is defined by then."""
    return REFERENCE.sub(lambda match: environment.get(match[1], match[0]), text)


def _value(variable: Manifest, spec: Manifest) -> str:
    match variable:
        case {"value": str(value)}:
            return value
        case {"valueFrom": {"fieldRef": {"fieldPath": path}}}:
            return FIELDS[path]
        case {"valueFrom": {"secretKeyRef": _}}:
            return SECRET
        case {"valueFrom": {"resourceFieldRef": {"containerName": name, "resource": "requests.cpu"}}}:
            assert name == spec["name"]
            return str(cpus(spec["resources"]["requests"]["cpu"]))
    raise AssertionError(f"not known here: {variable}")


def cpus(quantity: str) -> int:
    """Whole CPUs of a quantity, as the downward API rounds them."""
    return math.ceil(int(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1))


def mib(quantity: str) -> int:
    """MiB of a quantity."""
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


@functools.cache
def rendered(shape: str) -> Rendered:
    """The resources of an overlay, or of everything together."""
    if shape in (EVERYTHING, SECURED):
        components = [each for each in COMPONENTS if shape == SECURED or each not in IDENTITIES]
        # what makes identities of Deployments comes last: the others know them as Deployments
        return Rendered(tuple(kustomization(["base"], sorted(components, key=lambda each: each == "certificates"))))
    return Rendered(tuple(kustomize(FOLDER / "overlays" / shape)))


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all."""
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    for each in selector.get("matchExpressions", []):
        within = labels.get(each["key"]) in each["values"]
        assert each["operator"] in ("In", "NotIn")
        if within != (each["operator"] == "In"):
            return False
    return True


def walk(value: Any, key: str) -> Iterator[Any]:
    """Whatever stands under a key, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from walk(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner, key)
