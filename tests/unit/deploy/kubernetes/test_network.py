"""Who finds whom, and who may talk to whom: selectors, Services, budgets, policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.unit.deploy.kubernetes.manifests import (
    SHAPES,
    Manifest,
    Rendered,
    each_shape,
    matches,
    rendered,
    walk,
)

# Labels of Pods that are not ours, and of their namespaces; ours are all in one.
NAMESPACE = "vlcache"
OUTSIDE: dict[str, tuple[str, dict[str, str]]] = {
    "client": ("shop", {"vlcache/client": "true"}),
    "stranger": ("shop", {"app.kubernetes.io/name": "vlcache-not"}),
    "neighbour": (NAMESPACE, {"app.kubernetes.io/name": "something"}),
    "prometheus": ("monitoring", {"app.kubernetes.io/name": "prometheus"}),
    "false prometheus": ("shop", {"app.kubernetes.io/name": "prometheus"}),
    "picker": (NAMESPACE, {"inferencepool": "vlcache-epp"}),
    "dns": ("kube-system", {"k8s-app": "kube-dns"}),
}
CLIENTS_PORT, DNS_PORT = 50051, 53


@each_shape
def test_every_selector_finds_something(shape: str) -> None:
    everything = rendered(shape)
    ours, others = list(everything.pods.values()), [labels for _, labels in OUTSIDE.values()]
    found = 0
    for resource in everything.resources:
        for selector in [*walk(resource, "selector"), *walk(resource, "podSelector"), *walk(resource, "labelSelector")]:
            # Services say it shorter
            labels = {"matchLabels": selector} if resource["kind"] == "Service" else selector
            known = ours if resource["kind"] != "NetworkPolicy" else [*ours, *others]
            assert any(matches(labels, each) for each in known), (resource["kind"], resource["metadata"]["name"])
            found += 1
    assert found > 15


@each_shape
def test_a_deployment_selects_its_own_pods_alone(shape: str) -> None:
    everything = rendered(shape)
    for deployment in everything.workloads:
        selector = deployment["spec"]["selector"]
        name = deployment["metadata"]["name"]
        assert [pod for pod, labels in everything.pods.items() if matches(selector, labels)] == [name]


@each_shape
def test_every_role_has_one_budget_and_one_pod_at_most_leaves(shape: str) -> None:
    everything = rendered(shape)
    for pod, labels in everything.pods.items():
        # of a Pod with two, nothing can be evicted
        budgets = [each for each in everything.all("PodDisruptionBudget") if matches(each["spec"]["selector"], labels)]
        assert [each["spec"]["maxUnavailable"] for each in budgets] == ([] if pod == "redis" else [1])


@each_shape
def test_services_lead_to_ports_that_exist(shape: str) -> None:
    everything = rendered(shape)
    for service in everything.all("Service"):
        spec = service["spec"]
        (pod,) = (
            name for name, labels in everything.pods.items() if matches({"matchLabels": spec["selector"]}, labels)
        )
        ports = ports_of(everything, pod)
        for port in spec["ports"]:
            # whoever resolves a name himself uses the port of the process
            assert ports[port["targetPort"]] == port["port"], service["metadata"]["name"]


@each_shape
def test_scrapers_find_every_role_under_the_names_of_the_shipped_configuration(shape: str) -> None:
    headless = {
        each["metadata"]["name"] for each in rendered(shape).all("Service") if each["spec"].get("clusterIP") == "None"
    }
    assert headless == ({"router", "pair"} if shape == "same-node" else {"router", "prefill", "decode"})


def ports_of(everything: Rendered, pod: str) -> dict[str, int]:
    containers = [each for each in everything.containers if each.deployment["metadata"]["name"] == pod]
    ports = [item for each in containers for item in each.ports.items()]
    assert len(dict(ports)) == len(ports), f"two ports of {pod} have one name"
    return dict(ports)


@each_shape
def test_nobody_talks_to_whom_he_need_not(shape: str) -> None:
    """All ways between all Pods, ours and others, are tried against the policies."""
    everything = rendered(shape)
    watched, picked = bool(everything.all("PodMonitor")), bool(everything.all("InferencePool"))
    assert open_ways(everything) == needed_ways(everything, watched=watched, picked=picked)


def needed_ways(everything: Rendered, *, watched: bool, picked: bool) -> set[tuple[str, str, int]]:
    roles = {
        role: [pod for pod, labels in everything.pods.items() if labels.get(f"vlcache/{role}") == "true"]
        for role in ("prefill", "decode")
    }
    workers = sorted({*roles["prefill"], *roles["decode"]})
    ways = {("client", "router", CLIENTS_PORT)}
    if (http := ports_of(everything, "router").get("http")) is not None:
        ways.add(("client", "router", http))
    ways |= {("router", pod, 50051) for pod in roles["prefill"]}
    ways |= {(source, pod, 50052) for source in ("router", *roles["prefill"]) for pod in roles["decode"]}
    ways |= {(source, "redis", 6379) for source in ("router", *workers)}
    ways |= {(source, "dns", DNS_PORT) for source in ("router", *workers)}
    if watched:
        metrics = [
            (pod, port)
            for pod in ("router", *workers)
            for name, port in ports_of(everything, pod).items()
            if "metrics" in name
        ]
        ways |= {("prometheus", pod, port) for pod, port in metrics}
    if picked:
        ways.add(("picker", "router", 9464))
    return ways


def open_ways(everything: Rendered) -> set[tuple[str, str, int]]:
    pods = {**{name: (NAMESPACE, labels) for name, labels in everything.pods.items()}, **OUTSIDE}
    policies = everything.all("NetworkPolicy")
    ways = set()
    for source, target in ((a, b) for a in pods for b in pods):
        if {source, target} <= OUTSIDE.keys():
            continue
        ports = [DNS_PORT] if target in OUTSIDE else ports_of(everything, target).values()
        for port in (*ports, 443):
            outwards = allows(policies, "egress", "to", pods[source], pods[target], port)
            inwards = allows(policies, "ingress", "from", pods[target], pods[source], port)
            if outwards and inwards:
                ways.add((source, target, port))
    return ways


Pod = tuple[str, Mapping[str, str]]


def allows(policies: list[Manifest], way: str, peers: str, pod: Pod, other: Pod, port: int) -> bool:
    """Whether what selects `pod` lets a connection with `other` pass; what nothing selects may do everything."""
    namespace, labels = pod
    chosen = [
        each["spec"]
        for each in policies
        if each["metadata"]["namespace"] == namespace
        and matches(each["spec"]["podSelector"], labels)
        and way.capitalize() in each["spec"]["policyTypes"]
    ]
    if not chosen:
        return True
    return any(
        any(is_peer(peer, namespace, other) for peer in rule[peers])
        and any(each["port"] == port for each in rule["ports"])
        for spec in chosen
        for rule in spec.get(way, [])
    )


def is_peer(peer: Mapping[str, Any], own_namespace: str, other: Pod) -> bool:
    namespace, labels = other
    if "namespaceSelector" not in peer:
        inside = namespace == own_namespace
    else:
        inside = matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    return inside and matches(peer.get("podSelector", {}), labels)


def test_policies_name_no_port_at_which_nobody_listens() -> None:
    listening = {port for shape in SHAPES for each in rendered(shape).containers for port in each.ports.values()}
    for shape in SHAPES:
        for policy in rendered(shape).all("NetworkPolicy"):
            named = {port["port"] for ports in walk(policy["spec"], "ports") for port in ports}
            assert named <= {*listening, DNS_PORT}, (shape, policy["metadata"]["name"])


@pytest.mark.parametrize("name", ["nothing-else", "decode", "redis"])
def test_without_a_policy_more_would_be_open(name: str) -> None:
    """The search for open ways sees what a policy forbids and what it allows."""
    everything = rendered("cpu")
    fewer = Rendered(
        tuple(
            each for each in everything.resources if (each["kind"], each["metadata"]["name"]) != ("NetworkPolicy", name)
        )
    )
    assert open_ways(fewer) != open_ways(everything)
