"""What counts as lost, changed and doubled, and quantiles of a histogram's text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.chaos.figures import compared, failovers, longest_pause_ms, recovery_ms
from benchmarks.chaos.load import Stream
from shared.telemetry.metrics import BEGUN, NOT_BEGUN, RouterMetrics
from shared.telemetry.role_metrics import LATENCY_BUCKETS

TWIN = Stream((1, 2, 3), "abc")


def exposed(metrics: RouterMetrics) -> str:
    assert isinstance(metrics.registry, CollectorRegistry)
    return generate_latest(metrics.registry).decode()


def test_each_stream_is_judged_beside_its_twin() -> None:
    streams = [
        TWIN,
        Stream((1, 2, 4), "abd"),
        Stream((1, 2, 2, 3), "abbc"),
        Stream((1,), "a", failure="UNAVAILABLE: x"),
    ]
    assert compared(streams, [TWIN] * 4) == {
        "requests": 4,
        "completed": 3,
        "lost": 1,
        "changed_streams": 2,
        "duplicated_tokens": 1,
        "failures": ["UNAVAILABLE: x"],
    }


def test_a_pause_counts_where_a_worker_died_in_it() -> None:
    streams = [Stream((1, 2, 3), "", (1.0, 1.5, 4.0)), Stream((1, 2), "", (2.0, 2.25))]
    assert longest_pause_ms(streams, [1.25, 2.2]) == 2500.0
    assert longest_pause_ms(streams, [1.25]) == 500.0
    assert longest_pause_ms(streams, []) == 0.0


def test_failovers_are_counted_by_kind_and_timed_by_interpolation() -> None:
    metrics = RouterMetrics(worker="router")
    assert recovery_ms(exposed(metrics), 0.5, answer=BEGUN) is None
    for reason, count in (("DECODE_WORKER_LOST", 2), ("TRANSFER_TIMEOUT", 1)):
        metrics.labelled(metrics.failovers, kind="resend", reason=reason).inc(count)
    metrics.labelled(metrics.failovers, kind="reprefill", reason="DECODE_WORKER_LOST").inc(4)
    assert (failovers(exposed(metrics), "resend"), failovers(exposed(metrics), "reprefill")) == (3, 4)
    begun = metrics.labelled(metrics.failover_seconds, answer=BEGUN)
    for seconds in (0.0005, 0.0005, 0.003, 0.003):
        begun.observe(seconds)
    assert recovery_ms(exposed(metrics), 0.5, answer=BEGUN) == 1.0
    assert 2.2 < recovery_ms(exposed(metrics), 0.99, answer=BEGUN) <= 4.7
    metrics.labelled(metrics.failover_seconds, answer=NOT_BEGUN).observe(10_000)
    assert recovery_ms(exposed(metrics), 1.0, answer=BEGUN) <= 4.7
    assert recovery_ms(exposed(metrics), 1.0, answer=NOT_BEGUN) == 1000 * LATENCY_BUCKETS[-1]
