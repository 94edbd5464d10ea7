"""Metrics keep to their naming rules, are served over HTTP, and a blocked event loop shows."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import threading
import time
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from shared.telemetry.announce import announce
from shared.telemetry.exporter import MetricsExporter, watch_event_loop
from shared.telemetry.metrics import DecodeMetrics, PrefillMetrics, RouterMetrics
from shared.telemetry.role_metrics import LATENCY_BUCKETS, STAGE_BUCKETS, TOKEN_GAP_BUCKETS, geometric_buckets
from shared.telemetry.scope import Scope, within
from shared.version import VERSION
from tests.unit.shared.recording_span import RecordingSpan
from tests.unit.shared.scripted import run

UNITS = ("_seconds", "_bytes", "_ratio", "_info")
# Counts have no unit.
UNITLESS = {"num_requests_running", "num_requests_waiting", "worker_state", "visual_tokens", "image_pixels"}
UNITLESS |= {"decode_batch_size", "circuit_state", "tenant_requests_running", "tenant_requests_waiting"}
UNITLESS |= {"served_models", "outstanding_tokens"}
ROLES = {
    "router": RouterMetrics(worker="r0"),
    "prefill": PrefillMetrics(worker="p0", model="toy"),
    "decode": DecodeMetrics(worker="d0", model="toy"),
}


@pytest.mark.parametrize("role", ROLES)
def test_names_have_the_prefix_and_a_base_unit(role: str) -> None:
    families = list(ROLES[role].registry.collect())
    assert len(families) > 5
    for family in families:
        assert re.fullmatch(r"vlcache_[a-z0-9_]+", family.name)
        assert family.documentation
        if family.type in ("gauge", "histogram"):
            assert family.name.endswith(UNITS) or family.name.removeprefix("vlcache_") in UNITLESS, family.name


@pytest.mark.parametrize("role", ROLES)
def test_counters_end_in_total_and_nothing_else_does(role: str) -> None:
    metrics = ROLES[role]
    for collector, names in metrics.registry._collector_to_names.items():
        exposed = f"{collector._name}_total" in names
        assert exposed == (collector._type == "counter"), names


@pytest.mark.parametrize("role", ROLES)
def test_every_metric_has_the_fixed_labels(role: str) -> None:
    for collector in ROLES[role].registry._collector_to_names:
        if collector._type != "info":
            assert collector._labelnames[:3] == ("role", "worker", "model")


def test_every_role_has_what_all_share() -> None:
    for role, metrics in ROLES.items():
        labels = {"role": role, "worker": f"{role[0]}0", "model": "" if role == "router" else "toy"}
        build = {**labels, "version": VERSION}
        assert metrics.registry.get_sample_value("vlcache_build_info", build) == 1
        assert metrics.registry.get_sample_value("vlcache_event_loop_delay_seconds_count", labels) == 0
        assert metrics.registry.get_sample_value("vlcache_num_requests_running", labels) == 0


def test_the_description_is_what_is_there() -> None:
    for metrics in ROLES.values():
        described = {each.name.removesuffix("_total").removesuffix("_info"): each for each in metrics.described}
        families = {family.name: family for family in metrics.registry.collect()}
        assert described.keys() == families.keys()
        for name, family in families.items():
            assert (described[name].kind, described[name].text) == (family.type, family.documentation)


def test_what_has_not_happened_yet_is_zero() -> None:
    metrics = DecodeMetrics(worker="d2", model="toy")
    labels = {"role": "decode", "worker": "d2", "model": "toy"}
    for reason in ("evicted", "outgrown"):
        assert metrics.registry.get_sample_value("vlcache_preemptions_total", {**labels, "reason": reason}) == 0
    fixed = {"role": "router", "worker": "r3", "model": ""}
    pair = {**fixed, "kind": "migration", "reason": "DRAINING"}
    assert RouterMetrics(worker="r3").registry.get_sample_value("vlcache_failovers_total", pair) == 0


def test_labelled_children_are_counted_and_forgotten() -> None:
    metrics = RouterMetrics(worker="r1")
    fixed = {"role": "router", "worker": "r1", "model": ""}

    def read(name: str, state: str) -> float | None:
        labels = {**fixed, "name": name, "state": state}
        return metrics.registry.get_sample_value("vlcache_worker_state", labels)

    metrics.labelled(metrics.worker_state, name="d0", state="ready").set(1)
    metrics.labelled(metrics.worker_state, name="d1", state="ready").set(1)
    metrics.forget(metrics.worker_state, "d0", "ready")
    assert read("d0", "ready") is None
    assert read("d1", "ready") == 1
    metrics.labelled(metrics.requests, outcome="ok", code="OK").inc(2)
    assert metrics.registry.get_sample_value("vlcache_requests_total", {**fixed, "outcome": "ok", "code": "OK"}) == 2


def test_resident_bytes_are_read_from_their_owner_at_scrape_time() -> None:
    metrics, owned = DecodeMetrics(worker="d1", model="toy"), [10.0]
    metrics.watch_resident("active", lambda: owned[0])
    labels = {"role": "decode", "worker": "d1", "model": "toy", "state": "active"}
    assert metrics.registry.get_sample_value("vlcache_kv_resident_bytes", labels) == 10
    owned[0] = 0.0
    assert metrics.registry.get_sample_value("vlcache_kv_resident_bytes", labels) == 0


def test_stages_are_observed_by_name() -> None:
    metrics = PrefillMetrics(worker="p1", model="toy")
    metrics.observe_stage("select", 0.25)
    labels = {"role": "prefill", "worker": "p1", "model": "toy", "stage": "select"}
    assert metrics.registry.get_sample_value("vlcache_stage_seconds_sum", labels) == 0.25


def test_stages_of_the_request_at_work_become_spans_of_it() -> None:
    metrics, span = PrefillMetrics(worker="p1", model="toy"), RecordingSpan()
    metrics.observe_stage("preprocess", 0.5)
    with within(Scope(request_id="r", span=span)):
        metrics.observe_stage("select", 0.25, policy="vl_cache")
        metrics.observe_stages({"vision_encode": 0.1, "prefill": 0.2, "statistics": 0.3})
    assert span.stages == [
        ("select", 0.25, {"policy": "vl_cache"}, 0.0),
        ("vision_encode", 0.1, {}, pytest.approx(0.5)),
        ("prefill", 0.2, {}, pytest.approx(0.3)),
        ("statistics", 0.3, {}, pytest.approx(0.0)),
    ]


@pytest.mark.parametrize(
    ("buckets", "low", "high"),
    [(LATENCY_BUCKETS, 1e-3, 480), (TOKEN_GAP_BUCKETS, 1e-3, 80), (STAGE_BUCKETS, 1e-4, 480)],
)
def test_buckets_are_geometric_between_their_ends(buckets: tuple[float, ...], low: float, high: float) -> None:
    assert (buckets[0], buckets[-1]) == (low, high)
    ratios = [right / left for left, right in itertools.pairwise(buckets)]
    assert all(2.0 < ratio < 2.3 for ratio in ratios[:-1])
    assert 1 < ratios[-1] < 2.3


def test_a_decade_has_three_buckets() -> None:
    assert geometric_buckets(1.0, 10.0) == (1.0, 2.2, 4.7, 10.0)


def test_the_exporter_serves_the_registry_and_stops_cleanly() -> None:
    metrics = RouterMetrics(worker="r2")
    metrics.kv_saved_bytes.inc(123)
    threads = threading.active_count()
    with MetricsExporter(metrics.registry, host="127.0.0.1", port=0) as exporter:
        with urlopen(f"http://{exporter.address}/metrics", timeout=10) as response:
            text = response.read().decode()
        port = int(exporter.address.rpartition(":")[2])
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (sample,) = [s for s in families["vlcache_kv_bytes_saved"].samples if s.name.endswith("_total")]
    assert sample.value == 123
    assert threading.active_count() == threads
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))


def test_a_taken_metrics_port_is_an_os_error() -> None:
    with MetricsExporter(CollectorRegistry(), host="127.0.0.1", port=0) as exporter:
        port = int(exporter.address.rpartition(":")[2])
        with pytest.raises(OSError):
            MetricsExporter(CollectorRegistry(), host="127.0.0.1", port=port)


class Delays:
    """A histogram that tells when it has seen a long delay."""

    def __init__(self) -> None:
        self.long = asyncio.Event()

    def observe(self, seconds: float) -> None:
        assert seconds >= 0
        if seconds > 0.1:
            self.long.set()


def test_a_blocked_event_loop_is_measured_and_the_watch_ends() -> None:
    async def main() -> None:
        delays = Delays()
        async with watch_event_loop(delays, period_s=0.01):
            await asyncio.sleep(0)  # the watch falls asleep
            time.sleep(0.3)  # noqa: ASYNC251  blocks on purpose
            await asyncio.wait_for(delays.long.wait(), 20)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_failure_inside_the_watch_is_not_swallowed() -> None:
    async def main() -> None:
        async with watch_event_loop(Histogram("other_seconds", "text", registry=CollectorRegistry())):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(main)


def test_a_service_announces_its_ports_in_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    announce(name="d0", role="decode", address="127.0.0.1:1", metrics_address="127.0.0.1:2")
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "event": "listening",
        "name": "d0",
        "role": "decode",
        "address": "127.0.0.1:1",
        "metrics": "127.0.0.1:2",
    }
