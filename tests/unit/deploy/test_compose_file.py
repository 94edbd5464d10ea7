"""docker-compose.yml says nothing that code, images or monitoring do not know."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from shared.command_line import parse_config
from shared.registry.redis_client import PASSWORD_VARIABLE, RedisLocation
from shared.rpc.probe import ProbeConfig
from tests.containers.compose import FILES
from tests.integration.prometheus_server import ROOT, SHIPPED
from tests.integration.redis_server import ROUTER_ACL, WORKER_ACL
from tests.unit.deploy.compose_file import FILE, HOSTNAME, HTTP, SECURE, VARIABLE, arguments, read
from tests.unit.deploy.dockerfile import of

OVERRIDE = ROOT / "deploy" / "docker" / "debian.yml"
DATASOURCES = ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
CONFIGS: dict[str, type] = {"router": RouterConfig, "prefill_worker": PrefillConfig, "decode_worker": DecodeConfig}
MODULES = {
    "router": "router",
    "prefill": "prefill_worker",
    "decode": "decode_worker",
    "prefill-gpu": "prefill_worker",
    "decode-gpu": "decode_worker",
}
WORKERS = [name for name in MODULES if name != "router"]
DOCUMENT = read({PASSWORD_VARIABLE: "0123abcd"})
SERVICES = DOCUMENT["services"]

each_service = pytest.mark.parametrize("name", MODULES)
each_worker = pytest.mark.parametrize("name", WORKERS)


def configuration(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """What the process in a container of this service reads from its command line."""
    option, module, *flags = arguments(SERVICES[name], folder)
    assert (option, module) == ("-m", MODULES[name])
    patch.setattr("sys.argv", [module, *flags])
    return parse_config(CONFIGS[module], "")


def mounts(name: str) -> dict[str, str]:
    """Source of every mounted folder of a service."""
    return {target: source for source, target, *_ in (each.split(":") for each in SERVICES[name]["volumes"])}


@pytest.mark.parametrize("file", [FILE, OVERRIDE, SECURE, HTTP], ids=lambda file: file.name)
def test_the_file_is_what_the_compose_specification_wants(file: Path) -> None:
    command = shutil.which("check-jsonschema", path=sysconfig.get_path("scripts"))
    assert command is not None
    checked = [command, "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_http_is_off_unless_its_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration("router", tmp_path, monkeypatch).http_port is None
    override = read({PASSWORD_VARIABLE: "0123abcd"}, HTTP)["services"]["router"]
    _, module, *flags = arguments({**SERVICES["router"], **override}, tmp_path)
    monkeypatch.setattr("sys.argv", [module, *flags])
    port = parse_config(CONFIGS[module], "").http_port
    assert override["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_there_is_no_password_unless_somebody_thinks_of_one() -> None:
    with pytest.raises(KeyError, match=PASSWORD_VARIABLE):
        read({})


@each_service
def test_every_flag_exists_and_fits_the_rest_of_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, service = configuration(name, tmp_path, monkeypatch), SERVICES[name]
    assert config.host == "0.0.0.0"
    assert ProbeConfig().address == f"127.0.0.1:{config.port}"
    (exposed,) = of(service["build"]["target"], "EXPOSE")
    assert exposed == f"{config.port} {config.metrics_port}"
    assert RedisLocation.parse(config.registry).host in SERVICES
    assert PASSWORD_VARIABLE in service["environment"]
    grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) >= config.drain_s + 10


@each_worker
def test_replicas_of_a_worker_are_told_apart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(name, tmp_path, monkeypatch)
    assert config.advertise == f"{HOSTNAME}:{config.port}"
    assert HOSTNAME in config.name
    # neither would let a second container start
    assert not {"container_name", "hostname", "ports"} & SERVICES[name].keys()


@each_worker
def test_folders_that_are_written_are_mounted_and_belong_to_the_user_in_the_image(name: str) -> None:
    service = SERVICES[name]
    (folders,) = re.findall(r"--mode 0700 --owner 10001 --group 10001 ([^&]*) &&", of("service", "RUN")[0])
    (home,) = re.findall(r"HF_HOME=(\S+)", " ".join(of(service["build"]["target"], "ENV")))
    assert home in folders.split()
    named = {target for target, source in mounts(name).items() if source in DOCUMENT["volumes"]}
    assert named == set(folders.split())
    assert service["read_only"]
    assert service["tmpfs"] == ["/tmp:exec" if name.endswith("-gpu") else "/tmp"]


@pytest.mark.parametrize("suffix", ["", "-gpu"])
def test_decode_workers_reach_the_sockets_of_prefill_workers(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(f"prefill{suffix}", tmp_path, monkeypatch)
    (shared,) = [target for target, source in mounts(f"prefill{suffix}").items() if source == "arenas"]
    assert config.socket_dir.is_relative_to(shared)
    # under the same path: the router tells it
    assert mounts(f"decode{suffix}")[shared] == "arenas"


@pytest.mark.parametrize("variable", ["MODEL", "SERVED_MODEL_NAME", "DTYPE"])
def test_both_roles_hear_the_same_of_the_model(variable: str) -> None:
    changed = read({PASSWORD_VARIABLE: "0123abcd", variable: "float16"})["services"]
    flags = {name: [flag for flag in changed[name]["command"] if flag.endswith("=float16")] for name in WORKERS}
    assert all(len(found) == 1 for found in flags.values())
    assert len({found[0] for found in flags.values()}) == 1


@each_service
def test_a_service_may_do_little_and_has_bounds(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]


@each_service
def test_an_image_is_built_from_a_target_that_exists(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (ROOT / build["dockerfile"]).is_file()
    assert of(build["target"], "ENTRYPOINT") == [f'["python", "-m", "{MODULES[name]}"]']
    known = {each.partition("=")[0] for each in of(build["target"], "ARG")}
    assert set(build["args"]) <= known | {"BASE"}


def test_prometheus_looks_for_names_that_mean_the_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    ((search,),) = [job["dns_sd_configs"] for job in config["scrape_configs"]]
    for profile in ("cpu", "gpu"):
        chosen = {name: each for name, each in SERVICES.items() if profile in each.get("profiles", [profile])}
        aliases = {alias for each in chosen.values() for alias in _aliases(each)}
        assert set(search["names"]) <= {*chosen, *aliases}
    router = configuration("router", tmp_path, monkeypatch)
    assert search["port"] == router.metrics_port
    assert mounts("prometheus")["/etc/prometheus"] == "./deploy/prometheus"


def _aliases(service: dict[str, Any]) -> list[str]:
    return service.get("networks", {}).get("default", {}).get("aliases", [])


def test_grafana_finds_prometheus_and_its_dashboards() -> None:
    (source,) = yaml.safe_load(DATASOURCES.read_text())["datasources"]
    url = urlsplit(source["url"])
    assert url.hostname in SERVICES
    assert f"127.0.0.1:{url.port}:{url.port}" in SERVICES[url.hostname]["ports"]
    provided = yaml.safe_load((DATASOURCES.parents[1] / "dashboards" / "vlcache.yml").read_text())
    assert mounts("grafana")[provided["providers"][0]["options"]["path"]] == "./deploy/grafana/dashboards"


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "volumes" in service])
def test_whatever_is_mounted_exists(name: str) -> None:
    for source in mounts(name).values():
        assert source in DOCUMENT["volumes"] or (ROOT / source).is_dir(), source


def test_nothing_but_the_router_is_meant_for_others() -> None:
    for service in SERVICES.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
    opened = read({PASSWORD_VARIABLE: "0123abcd", "PUBLISH": "0.0.0.0"})["services"]
    assert [name for name, service in opened.items() if "0.0.0.0" in str(service.get("ports"))] == ["router"]


def test_redis_lets_workers_and_routers_do_what_they_need_and_no_more() -> None:
    (rights,) = re.findall(r"user default (.*)", SERVICES["redis"]["entrypoint"][2])
    reset, on, password, *rules = rights.split()
    assert (reset, on, password) == ("reset", "on", f">${PASSWORD_VARIABLE}")
    # PING is the health check's
    assert set(rules) == {"-@all", "+ping", *WORKER_ACL, *ROUTER_ACL}


def test_the_override_names_services_of_the_file() -> None:
    override = yaml.safe_load(OVERRIDE.read_text())["services"]
    assert override.keys() <= SERVICES.keys()
    targets = {each["build"]["target"] for each in override.values() if "build" in each}
    text = (OVERRIDE.parent / "debian.Dockerfile").read_text()
    assert targets == set(re.findall(r"^FROM \$\{BASE\} AS (\w+)$", text, re.MULTILINE))


def test_the_operators_page_says_how_to_start_it_and_names_every_variable() -> None:
    _, _, rest = (ROOT / "docs" / "operations.md").read_text().partition("\n## Containers\n")
    page, _, _ = rest.partition("\n## ")
    # as the test of the containers does
    assert f"\ndocker compose {' '.join(FILES)} up " in page
    for name, _, _ in VARIABLE.findall(FILE.read_text()):
        assert re.search(rf"\b{name}\b", page), name
