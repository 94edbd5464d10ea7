"""deploy/docker/secure.yml over docker-compose.yml: every service has its own certificate, and no other's key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from vlcache.certs.authority import make_certificates

from shared.command_line import parse_config
from shared.registry.redis_client import PASSWORD_VARIABLE
from shared.rpc.probe import ProbeConfig
from tests.unit.deploy.compose_file import SECURE, VARIABLE, arguments, read
from tests.unit.deploy.test_compose_file import CONFIGS, MODULES, SERVICES, each_service

OVERRIDE = read({PASSWORD_VARIABLE: "0123abcd"}, SECURE)["services"]
# The files of a service in its container.
INSIDE = "/run/tls"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `certs` and `tokens.txt` are in the operator's folder."""
    made = tmp_path_factory.mktemp("operator")
    make_certificates(made / "certs", hosts=["router", "prefill", "decode", "127.0.0.1"])
    (made / "tokens.txt").write_text(f"team-a {'0' * 64}\n")
    return made


def mounted(name: str, folder: Path) -> dict[str, str]:
    """The operator's file behind each path in the container."""
    pairs = [each.split(":") for each in OVERRIDE[name]["volumes"]]
    assert [mode for _, _, mode in pairs] == ["ro"] * len(pairs)
    return {inside: str(folder / source) for source, inside, _ in pairs}


def with_files(words: list[str], files: dict[str, str]) -> list[str]:
    return [files.get(word, word) for word in words]


def configuration(name: str, folder: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> Any:
    service = {**SERVICES[name], **{key: OVERRIDE[name][key] for key in ("hostname",)}}
    service["environment"] = {**service["environment"], **OVERRIDE[name]["environment"]}
    _, module, *flags = arguments(service, tmp_path)
    patch.setattr("sys.argv", [module, *with_files(flags, mounted(name, folder))])
    return parse_config(CONFIGS[module], "")


def test_it_covers_every_service_of_ours() -> None:
    assert OVERRIDE.keys() == MODULES.keys()


@each_service
def test_every_service_has_a_certificate_for_its_role_and_no_plaintext(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # reading it proves the certificate, its key and its role
    config = configuration(name, folder, tmp_path, monkeypatch)
    assert config.identity() is not None
    assert not config.allow_plaintext
    role = name.removesuffix("-gpu")
    keys = [source for source in mounted(name, folder).values() if source.endswith(".key")]
    assert keys == [str(folder / "certs" / f"{role}.key")]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "router"])
def test_a_worker_is_called_by_a_name_that_its_certificate_has(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(name, folder, tmp_path, monkeypatch)
    role = name.removesuffix("-gpu")
    assert config.advertise == f"{role}:{config.port}"
    aliases = SERVICES[name].get("networks", {}).get("default", {}).get("aliases", [])
    assert role in (name, *aliases)


def test_clients_need_a_token(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration("router", folder, tmp_path, monkeypatch).api_tokens is not None


@each_service
def test_the_health_check_shows_the_certificate(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, command = OVERRIDE[name]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    words = command.replace("$TLS", OVERRIDE[name]["environment"]["TLS"]).split()
    assert words[:3] == ["python", "-m", "shared.rpc.probe"]
    monkeypatch.setattr("sys.argv", ["probe", *with_files(words[3:], mounted(name, folder))])
    assert parse_config(ProbeConfig, "").identity() is not None


def test_nothing_is_mounted_that_nobody_reads() -> None:
    for service in OVERRIDE.values():
        said = f"{service['environment']['SECURITY']} {service['environment']['TLS']} "
        for each in service["volumes"]:
            _, inside, _ = each.split(":")
            assert inside.startswith(INSIDE)
            assert f"{inside} " in said.replace("\n", " ")


def test_the_page_names_its_variables_and_how_to_start_it() -> None:
    page = (SECURE.parents[2] / "docs" / "security.md").read_text()
    _, _, section = page.partition("\n## Containers\n")
    section, _, _ = section.partition("\n## ")
    assert "\ndocker compose -f docker-compose.yml -f deploy/docker/secure.yml --profile cpu up " in section
    for name in {name for name, _, _ in VARIABLE.findall(SECURE.read_text())}:
        assert re.search(rf"\b{name}\b", section), name
