"""Dashboards and alerts are what the code says, and speak of metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.boards.catalogue import BOARDS
from deploy.grafana.panel import WIDTH, Board
from shared.telemetry.metrics import DecodeMetrics, PrefillMetrics, RouterMetrics
from shared.telemetry.role_metrics import FIXED_LABELS, Description
from tests.integration.prometheus_server import ROOT, SHIPPED, find_binary

GRAFANA = ROOT / "deploy" / "grafana"
ROLES = (RouterMetrics(worker="r"), PrefillMetrics(worker="p", model="m"), DecodeMetrics(worker="d", model="m"))
METRICS: dict[str, Description] = {each.name: each for role in ROLES for each in role.described}
RULES = yaml.safe_load((SHIPPED / "rules.yml").read_text())["groups"][0]["rules"]
SCALERS = [ROOT / "deploy/kubernetes/components/autoscaling" / f"{role}.yaml" for role in ("prefill", "decode")]
HISTOGRAM_SUFFIX = re.compile(r"_(bucket|sum|count)$")
# What Prometheus and `histogram_quantile` add.
MORE_LABELS = {*FIXED_LABELS, "le", "job", "instance"}

each_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


def expressions() -> list[str]:
    drawn = [query.expr for board in BOARDS for panel in board.panels for query in panel.queries]
    scaled = [yaml.safe_load(file.read_text())["spec"]["triggers"][0]["metadata"]["query"] for file in SCALERS]
    return sorted({*drawn, *scaled, *(rule["expr"] for rule in RULES)})


def read(board: Board) -> dict[str, Any]:
    return json.loads((GRAFANA / "dashboards" / f"{board.uid}.json").read_text())


@each_board
def test_the_committed_dashboard_is_what_the_code_writes(board: Board) -> None:
    draw = pytest.importorskip("deploy.grafana.draw", reason="the dashboards' library needs Python 3.11")
    committed = (GRAFANA / "dashboards" / f"{board.uid}.json").read_text()
    assert committed == draw.to_json(board), "run `make docs`"


def test_there_is_a_file_per_dashboard() -> None:
    assert {file.stem for file in (GRAFANA / "dashboards").iterdir()} == {board.uid for board in BOARDS}


@each_board
def test_panels_say_what_they_mean_and_do_not_overlap(board: Board) -> None:
    cells: set[tuple[int, int]] = set()
    panels = read(board)["panels"]
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= WIDTH
        cells |= own


@each_board
def test_panels_ask_the_prometheus_that_was_chosen(board: Board) -> None:
    document = read(board)
    (variable,) = document["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    assert {panel["datasource"]["uid"] for panel in document["panels"]} == {"${datasource}"}


@pytest.mark.parametrize("expr", expressions())
def test_an_expression_uses_metrics_and_labels_that_exist(expr: str) -> None:
    used = re.findall(r"vlcache_\w+", expr)
    assert used or expr.startswith("up{")
    labels = set(MORE_LABELS)
    for name in used:
        family = name if name in METRICS else HISTOGRAM_SUFFIX.sub("", name)
        assert family in METRICS, name
        assert (METRICS[family].kind == "histogram") == (family != name), f"{name} is a {METRICS[family].kind}"
        labels |= set(METRICS[family].labels)
    grouped = ", ".join(re.findall(r"by \(([^)]*)\)", expr)).split(", ")
    selected = re.findall(r"(\w+)[!=]~?=?\"", expr)
    assert {*grouped, *selected} - {""} <= labels


@pytest.mark.parametrize("expr", expressions())
def test_rates_are_those_of_what_only_grows(expr: str) -> None:
    for name in re.findall(r"(?:rate|increase)\((vlcache_\w+)", expr):
        assert name.endswith(("_total", "_bucket", "_sum", "_count")), name


def test_every_metric_that_must_stay_zero_has_an_alert_or_a_panel() -> None:
    together = " ".join(expressions())
    for name in ("kv_orphan_bytes", "lease_expired_total", "circuit_state", "worker_heartbeat_age_seconds"):
        assert f"vlcache_{name}" in together


def test_every_alert_is_told_apart_and_tested() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    tests = (SHIPPED / "rules_test.yml").read_text()
    for rule in RULES:
        assert rule["alert"] in tests
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "runbook"} == rule["annotations"].keys()


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
)
def test_prometheus_takes_the_files(command: tuple[str, ...]) -> None:
    done = subprocess.run([find_binary("promtool"), *command], cwd=SHIPPED, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_grafana_is_told_where_everything_is() -> None:
    folder = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "vlcache.yml").read_text())["providers"]
    scraped = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert source["jsonData"]["timeInterval"] == scraped
    assert Path(provider["options"]["path"]).is_absolute()
