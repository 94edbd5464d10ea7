"""Every query of every dashboard and every alert, asked of a real Prometheus that watches a real stack at work."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import vlcache
import yaml

from deploy.grafana.picture.__main__ import PictureConfig, collect
from deploy.local.forks import Forks
from models.shapes_vlm.paths import SAMPLES
from tests.integration.conftest import stack_config
from tests.integration.prometheus_server import ROOT, PrometheusServer
from tests.integration.running_stack import RunningStack

FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
# the stack and the scrapes belong to whichever test comes first
pytestmark = pytest.mark.timeout(300)
# Grafana takes four scrape intervals; longer, so that a slow machine still has two scrapes with work between them.
INTERVAL = "30s"
# Between two points of a query over time.
STEP_S = 1.0
# Names that `docs/operations.md` gives to endpoint pickers.
PICKED = ("vlcache_num_requests_waiting", "vlcache_num_requests_running", "vlcache_kv_cache_usage_ratio")
IMAGE = (SAMPLES / "scene_1.png").read_bytes()


@dataclass(frozen=True)
class Watched:
    """A Prometheus, and when what it watches has worked, in Unix time."""

    server: PrometheusServer
    start_s: float
    end_s: float


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Watched]:
    config = stack_config("auto", router_flags=("--shadow-share", "1"))
    with RunningStack(config, forks) as stack:
        targets = [service.metrics_address for service in stack.services]
        with PrometheusServer(tmp_path_factory.mktemp("prometheus"), targets) as server:
            server.wait_for(lambda: server.query("sum (up) == 3"))
            start_s = time.time()
            for rounds in (1, 2):
                work(stack)
                # a rate needs what happens between two scrapes
                server.wait_for(lambda done=rounds: has_seen(server, answers=6 * done, shadows=done))
            # the last step of a query must not come before the last scrape
            yield Watched(server, start_s, time.time() + STEP_S)
    assert stack.clean


def work(stack: RunningStack) -> None:
    """Six answers. The last one's shadow has nobody to give way to."""
    for tenant in (None, "acme"):
        with vlcache.Client(stack.address, tenant=tenant, timeout=vlcache.Timeout(total_s=120)) as client:
            for limit in (0.0, 0.5, 1.0):
                compression = vlcache.Compression(retention=0.2, max_dropped_attention=limit)
                sampling = vlcache.Sampling(max_new_tokens=6, ignore_eos=True)
                client.generate("What is it?", images=[IMAGE], sampling=sampling, compression=compression)


def has_seen(server: PrometheusServer, *, answers: int, shadows: int) -> bool:
    """Whether scrapes know of so many answers, and of so many of their shadows at least."""
    finished = f'sum (vlcache_requests_total{{outcome="finished"}}) == {answers}'
    compared = f'sum (vlcache_shadow_requests_total{{outcome="compared"}}) >= {shadows}'
    return bool(server.query(f"({finished}) and ({compared})"))


def total(server: PrometheusServer, selector: str) -> float:
    (sum_of,) = server.query(f"sum ({selector})")
    return float(sum_of["value"][1])


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_every_query_of_every_panel_returns_data(watched: Watched, file: Path) -> None:
    panels = json.loads(file.read_text())["panels"]
    assert len(panels) > 3
    wrong = {
        f"{panel['title']} {target['refId']}": complaint
        for panel in panels
        for target in panel["targets"]
        if (complaint := complaint_of(watched, panel["type"], target))
    }
    assert wrong == {}


def complaint_of(watched: Watched, kind: str, target: dict[str, Any]) -> str:
    """What is wrong with the answer to a panel's query; empty where nothing is."""
    expr = target["expr"].replace("$__rate_interval", INTERVAL)
    if target["instant"]:
        series = [[sample["value"]] for sample in watched.server.query(expr)]
    else:
        matrix = watched.server.query_range(expr, start_s=watched.start_s, end_s=watched.end_s)
        series = [each["values"] for each in matrix]
    values = [number for points in series for _, text in points if math.isfinite(number := float(text))]
    if not values or min(values) < 0:
        return f"{expr} has the values {values}"
    return f"{expr} has no row per bucket" if kind == "heatmap" and len(series) < 5 else ""


def test_a_picture_has_something_to_draw_in_every_panel(watched: Watched) -> None:
    config = PictureConfig(out=Path("unused.png"), prometheus=watched.server.url, seconds=30)
    view = collect(config)
    assert [len(shown["series"]) > 0 for shown in view["panels"]] == [True] * 9
    layers = next(shown for shown in view["panels"] if shown["panel"]["title"] == "Retention by layer")
    assert {"layer 0", "layer 7"} <= {series["legend"] for series in layers["series"]}
    json.dumps(view, allow_nan=False)


def test_what_must_not_happen_is_shown_as_zero(watched: Watched) -> None:
    for metric in ("lease_expired_total", "kv_resend_total", "kv_transfer_failures_total", "failovers_total"):
        assert total(watched.server, f"vlcache_{metric}") == 0, metric
    assert total(watched.server, 'vlcache_circuit_state{state="closed"}') == 2
    assert total(watched.server, 'vlcache_circuit_state{state!="closed"}') == 0


@pytest.mark.parametrize("name", PICKED)
def test_every_process_has_what_an_endpoint_picker_reads(watched: Watched, name: str) -> None:
    samples = watched.server.query(name)
    assert {sample["metric"]["role"] for sample in samples} == {"router", "prefill", "decode"}
    assert len(samples) == 3, "a picker takes any sample of a name"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_workers_are_scaled_on_is_one_number(watched: Watched, role: str) -> None:
    scaler = yaml.safe_load((ROOT / "deploy/kubernetes/components/autoscaling" / f"{role}.yaml").read_text())
    (trigger,) = scaler["spec"]["triggers"]
    (sample,) = watched.server.query(trigger["metadata"]["query"])
    assert float(sample["value"][1]) >= 0


def test_what_was_saved_adds_up(watched: Watched) -> None:
    names = ("vlcache_kv_bytes_full_total", "vlcache_kv_bytes_kept_total", "vlcache_kv_bytes_saved_total")
    full, kept, saved = (total(watched.server, name) for name in names)
    assert full == kept + saved > 0
    by_tenant = watched.server.query("sum by (tenant) (vlcache_tenant_kv_bytes_saved_total)")
    assert {each["metric"]["tenant"] for each in by_tenant} == {"default", "acme"}
    assert sum(float(each["value"][1]) for each in by_tenant) == saved


def test_every_alert_is_evaluated_and_none_fires(watched: Watched) -> None:
    server = watched.server

    def rules() -> list[dict[str, Any]]:
        (group,) = server.get("rules")["groups"]
        return group["rules"]

    server.wait_for(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert len(rules()) > 10
    for rule in rules():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
        assert rule["state"] != "firing", rule["name"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "runbook"} <= rule["annotations"].keys()
