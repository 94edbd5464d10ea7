"""What is watched and what follows load: monitors, rules, scalers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from deploy.kubernetes.__main__ import RESOURCE, RULES, as_resource
from shared.telemetry.metrics import RouterMetrics
from tests.integration.prometheus_server import SHIPPED
from tests.unit.deploy.kubernetes.manifests import (
    EVERYTHING,
    FOLDER,
    SECURED,
    Manifest,
    Rendered,
    each_shape,
    matches,
    rendered,
)

PAGES = Path(__file__).parents[4] / "docs"


def scalers() -> list[Manifest]:
    return rendered(EVERYTHING).all("ScaledObject")


def test_the_committed_rule_is_what_the_rules_file_says() -> None:
    assert RESOURCE.read_text() == as_resource(RULES.read_text()), "run `make docs`"
    (rule,) = rendered(EVERYTHING).all("PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())


def test_every_process_is_scraped_under_the_job_of_the_rules() -> None:
    everything = rendered("monitored")
    (monitor,) = everything.all("PodMonitor")
    (job,) = (each["job_name"] for each in yaml.safe_load((SHIPPED / "prometheus.yml").read_text())["scrape_configs"])
    wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for container in (*everything.services, *rendered("same-node").services):
        labels = container.deployment["spec"]["template"]["metadata"]["labels"]
        assert matches(monitor["spec"]["selector"], labels)
        assert labels[monitor["spec"]["jobLabel"]] == job
        assert len(wanted & container.ports.keys()) == 1, container.name
    assert f'job="{job}"' in RULES.read_text()


def test_workers_follow_tokens_and_memory_and_never_requests() -> None:
    queries = {each["metadata"]["name"]: each["spec"]["triggers"][0]["metadata"]["query"] for each in scalers()}
    assert queries.keys() == {"prefill", "decode"}
    assert "vlcache_outstanding_tokens" in queries["prefill"]
    assert "vlcache_kv_cache_usage_ratio" in queries["decode"]
    for role, query in queries.items():
        assert f'role="{role}"' in query
        assert "requests" not in query


def scalers_of(everything: Rendered) -> list[Manifest]:
    """What is scaled, by whatever kind."""
    scalers = [*everything.all("ScaledObject"), *everything.all("HorizontalPodAutoscaler")]
    return [each["spec"]["scaleTargetRef"] for each in scalers]


@each_shape
def test_what_scales_has_a_target_without_a_number_of_its_own(shape: str) -> None:
    everything = rendered(shape)
    targets = {each["name"] for each in scalers_of(everything)}
    for deployment in everything.workloads:
        assert ("replicas" in deployment["spec"]) != (deployment["metadata"]["name"] in targets)
    for each in scalers_of(everything):
        everything.named(each.get("kind", "Deployment"), each["name"])
    assert targets == ({"router", "prefill", "decode"} if shape in ("monitored", EVERYTHING, SECURED) else set())


@pytest.mark.parametrize("kind", ["ScaledObject", "HorizontalPodAutoscaler"])
def test_nothing_scales_below_two(kind: str) -> None:
    for each in rendered(EVERYTHING).all(kind):
        spec = each["spec"]
        low, high = (spec.get(f"{end}ReplicaCount") or spec.get(f"{end}Replicas") for end in ("min", "max"))
        assert 2 <= low < high


def test_an_endpoint_picker_finds_routers_and_their_gauges() -> None:
    everything = rendered(EVERYTHING)
    (pool,) = everything.all("InferencePool")
    assert [pod for pod, labels in everything.pods.items() if matches(pool["spec"]["selector"], labels)] == ["router"]
    (router,) = (each for each in everything.services if each.name == "router/router")
    assert [each["number"] for each in pool["spec"]["targetPorts"]] == [router.ports["grpc"]]
    page = (PAGES / "operations.md").read_text()
    label = "llm-d.ai/engine-type"
    assert f"{label}: {everything.pods['router'][label]}" in page
    named = set(re.findall(r"Spec: (vlcache_\w+)", page))
    assert len(named) == 3
    assert named <= {each.name for each in RouterMetrics(worker="").described}


def test_the_page_speaks_of_what_there_is() -> None:
    page = (PAGES / "kubernetes.md").read_text()
    for folder in re.findall(r"deploy/kubernetes/((?:overlays|components)/[\w-]+)", page):
        assert (FOLDER / folder).is_dir(), folder
    for kind in ("overlays", "components"):
        for folder in (FOLDER / kind).iterdir():
            assert folder.name in page, folder.name
    keys = {
        each["valueFrom"]["secretKeyRef"]["key"]
        for container in rendered(EVERYTHING).containers
        for each in container.spec["env"]
        if "secretKeyRef" in each.get("valueFrom", {})
    }
    assert keys == set(re.findall(r"--from-literal=([\w-]+)=", page))
