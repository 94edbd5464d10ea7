"""What is rendered is what an API server takes, field by field."""

from __future__ import annotations

import copy

import jsonschema
import kubernetes_validate
import pytest

from tests.unit.deploy.kubernetes.custom_resources import SCHEMAS
from tests.unit.deploy.kubernetes.manifests import EVERYTHING, Manifest, each_shape, rendered

# The oldest that docs/kubernetes.md promises (`preStop.sleep`), and a recent one.
VERSIONS = ("1.30", "1.34")


def validate(resource: Manifest, version: str) -> None:
    """Raises where a field is unknown, missing, or of another type."""
    if resource["kind"] in SCHEMAS:
        jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    else:
        kubernetes_validate.validate(resource, version, strict=True)


@each_shape
@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_is_valid(shape: str, version: str) -> None:
    resources = rendered(shape).resources
    assert len(resources) > 15
    for resource in resources:
        validate(resource, version)


def test_everything_has_every_kind_of_custom_resource() -> None:
    kinds = {resource["kind"] for resource in rendered(EVERYTHING).resources}
    assert SCHEMAS.keys() <= kinds


@pytest.mark.parametrize("kind", ["Deployment", "NetworkPolicy", "PodDisruptionBudget", *SCHEMAS])
def test_a_misspelt_field_is_refused(kind: str) -> None:
    resource = copy.deepcopy(rendered(EVERYTHING).all(kind)[0])
    validate(resource, VERSIONS[0])
    resource["spec"]["selektor"] = {}
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError), match="selektor"):
        validate(resource, VERSIONS[0])


@each_shape
def test_everything_is_in_one_namespace_and_named_once(shape: str) -> None:
    resources = rendered(shape).resources
    (namespace,) = rendered(shape).all("Namespace")
    names = [(each["kind"], each["metadata"]["name"]) for each in resources]
    assert len(set(names)) == len(names)
    for each in resources:
        assert each is namespace or each["metadata"]["namespace"] == namespace["metadata"]["name"]
