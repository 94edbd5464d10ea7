"""Spans reach an OTLP receiver with their parents, and whoever does not send them is not disturbed by that."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from router.config import RouterConfig
from shared.telemetry import tracer as tracers
from shared.telemetry.otlp import FLUSH_S
from shared.telemetry.span import NO_SPAN
from shared.telemetry.tracer import NO_TRACER, Tracer, check_endpoint, open_tracer, split_endpoint
from tests.integration.otlp_receiver import OtlpReceiver

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"
UNSAMPLED = PARENT[:-2] + "00"
SAMPLED = 1


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def close(tracer: Tracer) -> None:
    asyncio.run(tracer.close())


def test_a_span_with_its_stages_and_events(receiver: OtlpReceiver) -> None:
    tracer = open_tracer(receiver.address, role="prefill", name="p0")
    span = tracer.begin("Prefill", (("traceparent", PARENT), ("other-bin", b"x")), {"request_id": "r"})
    span.stage("select", 0.25, {"policy": "vl_cache"}, ago_s=0.5)
    span.event("failover", {"kind": "resend"})
    span.set({"code": "OK"})
    span.end("ABORTED")
    for late in (span.end, lambda: span.set({"code": "late"}), lambda: span.event("late", {})):
        late()
    close(tracer)
    stage, whole = receiver.spans()
    assert (whole.name, whole.trace_id, whole.parent_id) == ("Prefill", "a" * 32, "b" * 16)
    assert (whole.service, whole.instance, whole.error) == ("vlcache-prefill", "p0", "ABORTED")
    assert whole.attributes == {"request_id": "r", "code": "OK"}
    assert whole.events == [("failover", {"kind": "resend"})]
    assert (stage.name, stage.parent_id, stage.attributes) == ("select", whole.span_id, {"policy": "vl_cache"})
    assert stage.end_s - stage.start_s == pytest.approx(0.25, abs=1e-6)
    assert 0.5 <= whole.end_s - stage.end_s < 5
    assert span.metadata == (("traceparent", f"00-{'a' * 32}-{whole.span_id}-01"),)


def test_a_worker_begins_no_trace(receiver: OtlpReceiver) -> None:
    tracer = open_tracer(receiver.address, role="decode", name="d0")
    for metadata in ((), (("traceparent", "nonsense"),)):
        assert tracer.begin("sequence", metadata, {}) is NO_SPAN
    close(tracer)
    assert receiver.spans() == []


@pytest.mark.parametrize(
    ("share", "metadata", "sent"), [(0.0, (), 0), (1.0, (), 1), (1.0, UNSAMPLED, 0), (0.0, PARENT, 1)]
)
def test_a_share_of_the_requests_without_a_trace(
    receiver: OtlpReceiver, share: float, metadata: str | tuple[()], sent: int
) -> None:
    tracer = open_tracer(receiver.address, role="router", name="r", share=share)
    span = tracer.begin("Generate", (("traceparent", metadata),) if metadata else (), {})
    span.end()
    close(tracer)
    assert len(receiver.spans()) == sent
    # the next service hears of it in any case, lest it decides otherwise
    _, _, _, flags = dict(span.metadata)["traceparent"].split("-")
    assert int(flags, 16) & SAMPLED == sent


def test_a_silent_receiver_does_not_hold_up_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer = open_tracer(f"127.0.0.1:{silent.getsockname()[1]}", role="router", name="r", share=1.0)
        began = time.monotonic()
        for _ in range(5000):
            tracer.begin("Generate", (), {}).end()
        assert time.monotonic() - began < 5
        began = time.monotonic()
        close(tracer)
        assert time.monotonic() - began < FLUSH_S + 2


def test_without_an_endpoint_there_is_nothing() -> None:
    tracer = open_tracer("", role="router", name="r", share=1.0)
    assert tracer is NO_TRACER
    span = tracer.begin("Generate", (("traceparent", PARENT),), {})
    assert (span, span.trace_id, span.metadata) == (NO_SPAN, "", ())
    close(tracer)


@pytest.mark.parametrize(
    ("endpoint", "address", "secure"),
    [
        ("collector:4317", "collector:4317", False),
        ("http://[::1]:4317/", "[::1]:4317", False),
        ("https://otlp.example:443", "otlp.example:443", True),
    ],
)
def test_endpoints(endpoint: str, address: str, secure: bool) -> None:
    assert split_endpoint(endpoint) == (address, secure)


@pytest.mark.parametrize(
    "endpoint", ["collector", "grpc://collector:4317", "http://collector:4317/v1/traces", ":", "a b:1"]
)
def test_a_bad_endpoint_is_refused_at_the_start(endpoint: str) -> None:
    with pytest.raises(ValueError, match="OTLP endpoint"):
        RouterConfig(registry="static://127.0.0.1:1", otlp_endpoint=endpoint)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracers, "EXPORTER", "shared.telemetry.not_there")
    with pytest.raises(ValueError, match=r"pip install '\.\[traces\]'"):
        check_endpoint("collector:4317")
    with pytest.raises(ValueError, match="OpenTelemetry"):
        RouterConfig(registry="static://127.0.0.1:1", otlp_endpoint="collector:4317")
