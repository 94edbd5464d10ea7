"""Metrics say what happened, in seconds and bytes."""

from __future__ import annotations

import grpc
import pytest
from prometheus_client import generate_latest
from vlcache.v1 import inference_pb2 as pb

from router.accounting import Accounting
from router.admission.tenant_labels import MAX_LABELS
from router.summary import Summary, write_access_line
from shared import errors
from shared.telemetry.metrics import RouterMetrics
from shared.telemetry.scope import Scope, within
from tests.unit.router.fakes import FULL_BYTES, KEPT_BYTES, SENT_BYTES, bench, run
from tests.unit.shared.recording_span import RecordingSpan


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def accounting(clock: Clock) -> Accounting:
    return Accounting(RouterMetrics(worker="router"), clock=clock)


def value(accounting: Accounting, name: str, **labels: str) -> float | None:
    fixed = {"role": "router", "worker": "router", "model": ""}
    return accounting.metrics.registry.get_sample_value(f"vlcache_{name}", fixed | labels)


def test_latencies_of_one_request(accounting: Accounting, clock: Clock) -> None:
    account = accounting.open()
    assert value(accounting, "num_requests_running") == 1
    for wait_s in (0.5, 0.2, 0.1, 0.3):
        clock.now_s += wait_s
        account.tokens(1)
    clock.now_s += 5
    account.finished()
    assert value(accounting, "time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert value(accounting, "time_to_second_token_seconds_sum") == pytest.approx(0.7)
    assert value(accounting, "inter_token_latency_seconds_count") == 3
    assert value(accounting, "inter_token_latency_seconds_sum") == pytest.approx(0.6)
    assert value(accounting, "request_time_per_output_token_seconds_sum") == pytest.approx(0.2)
    # E2E ends at the last token, not when the books are closed
    assert value(accounting, "e2e_request_latency_seconds_sum") == pytest.approx(1.1)
    assert value(accounting, "generation_tokens_total") == 4
    assert value(accounting, "num_requests_running") == 0


def test_what_a_request_has_come_to_is_told_once() -> None:
    told: list[Summary] = []
    clock, span = Clock(), RecordingSpan()
    accounting = Accounting(RouterMetrics(worker="router"), clock=clock, report=told.append)
    with within(Scope(request_id="r", span=span)):
        account = accounting.open("team-a", "toy")
    with accounting.waiting("team-a"):
        assert (accounting.requests_running, accounting.requests_waiting) == (1, 1)
    account.placed("p0", "d0")
    account.goes_on("resend", "DECODE_WORKER_LOST", "d0")
    account.placed("p0", "d1")
    account.compression(
        pb.Compression(policy="knorm", realised_retention=0.25, asked_retention=0.5, full_bytes=400, kept_bytes=100)
    )
    for _ in range(2):
        account.transfer(pb.Transfer(transport="memory", sent_bytes=110))
    clock.now_s += 0.5
    account.tokens(2)
    clock.now_s += 1.0
    account.failed(errors.AbortedError("no", reason="RELEASED"))
    account.left("decode", None)
    (summary,) = told
    assert summary == Summary(
        tenant="team-a",
        outcome="failed",
        code="ABORTED",
        reason="RELEASED",
        model="toy",
        policy="knorm",
        retention_asked=0.5,
        retention=0.25,
        generated_tokens=2,
        kv_full_bytes=400,
        kv_kept_bytes=100,
        kv_sent_bytes=220,
        transport="memory",
        first_token_s=pytest.approx(0.5),
        total_s=pytest.approx(1.5),
        prefill_worker="p0",
        decode_worker="d1",
        failovers=1,
    )
    assert (span.attributes, span.ends) == (summary.known(), ["ABORTED"])
    lost = {"kind": "resend", "reason": "DECODE_WORKER_LOST", "worker": "d0"}
    assert span.events == [("failover", lost), ("first_token", {})]
    assert (accounting.requests_running, accounting.requests_waiting, accounting.totals.generated_tokens) == (0, 0, 2)


def test_the_access_line_has_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="router.access"):
        write_access_line(Summary(tenant="t", outcome="refused", code="NOT_FOUND", total_s=1 / 3))
    (record,) = caplog.records
    assert record.getMessage() == "tenant=t outcome=refused code=NOT_FOUND total_s=0.3333 failovers=0"
    assert record.details == {
        "tenant": "t",
        "outcome": "refused",
        "code": "NOT_FOUND",
        "total_s": 1 / 3,
        "failovers": 0,
    }


def test_tokens_that_come_together_share_their_gap(accounting: Accounting, clock: Clock) -> None:
    account = accounting.open()
    account.tokens(1)
    clock.now_s += 0.6
    account.tokens(3)
    account.tokens(0)
    assert value(accounting, "inter_token_latency_seconds_count") == 3
    assert value(accounting, "inter_token_latency_seconds_sum") == pytest.approx(0.6)


def test_a_single_token_has_no_time_per_token(accounting: Accounting) -> None:
    account = accounting.open()
    account.tokens(1)
    account.finished()
    assert value(accounting, "request_time_per_output_token_seconds_count") == 0


def test_a_request_ends_once(accounting: Accounting) -> None:
    account = accounting.open()
    account.failed(errors.DataLossError("x"))
    account.left("decode", None)
    account.finished()
    assert value(accounting, "requests_total", outcome="failed", code="DATA_LOSS") == 1
    assert value(accounting, "requests_total", outcome="finished", code="OK") == 0
    assert value(accounting, "num_requests_running") == 0


def test_bugs_count_as_internal_and_deadlines_as_failures(accounting: Accounting) -> None:
    accounting.open().failed(KeyError("bug"))
    accounting.open().left("prefill", errors.DeadlineExceededError("late"))
    assert value(accounting, "requests_total", outcome="failed", code="INTERNAL") == 1
    assert value(accounting, "requests_total", outcome="failed", code="DEADLINE_EXCEEDED") == 1
    assert value(accounting, "cancellations_total", stage="prefill") == 0


def test_waiting_is_measured(accounting: Accounting, clock: Clock) -> None:
    with accounting.waiting():
        assert value(accounting, "num_requests_waiting") == 1
        clock.now_s += 2
    assert value(accounting, "num_requests_waiting") == 0
    assert value(accounting, "reservation_wait_seconds_sum") == pytest.approx(2)


def test_names_of_tenants_make_a_bounded_number_of_series(accounting: Accounting) -> None:
    error = errors.ResourceExhaustedError("x", reason="TENANT_RATE")
    for number in range(200):
        account = accounting.open(f"tenant-{number}")
        account.compression(pb.Compression(full_bytes=10, kept_bytes=4))
        account.tokens(1)
        account.finished()
        with accounting.waiting(f"tenant-{number}"):
            accounting.refused(error, f"tenant-{number}")
    by_tenant: dict[str, set[str]] = {}
    for family in accounting.metrics.registry.collect():
        for sample in family.samples:
            if "tenant" in sample.labels:
                by_tenant.setdefault(sample.name, set()).add(sample.labels["tenant"])
    assert by_tenant["vlcache_tenant_kv_bytes_saved_total"] >= {"other", "tenant-0"}
    assert max(len(tenants) for tenants in by_tenant.values()) <= MAX_LABELS + 1
    assert value(accounting, "kv_bytes_saved_total") == 200 * 6


def test_what_clients_name_is_no_label() -> None:
    async def main() -> None:
        async with bench() as b:
            with pytest.raises(grpc.aio.AioRpcError):
                await b.answer(model="evil-model", request_id="evil-id")
            with pytest.raises(grpc.aio.AioRpcError):
                await b.answer(compression=pb.CompressionParams(policy="evil-policy"))
            await b.answer(request_id="evil-id")
            text = generate_latest(b.router.metrics.registry).decode()
            assert 'code="NOT_FOUND"' in text
            assert "evil" not in text

    run(main)


def test_a_real_answer_fills_every_metric_of_it() -> None:
    async def main() -> None:
        async with bench() as b:
            for _ in range(2):
                await b.answer()
            assert b.metric("requests_total", outcome="finished", code="OK") == 2
            assert b.metric("time_to_first_token_seconds_count") == 2
            assert b.metric("time_to_second_token_seconds_count") == 2
            assert b.metric("kv_bytes_full_total") == 2 * FULL_BYTES
            assert b.metric("kv_bytes_kept_total") == 2 * KEPT_BYTES
            assert b.metric("kv_bytes_saved_total") == 2 * (FULL_BYTES - KEPT_BYTES)
            assert b.metric("kv_bytes_sent_total") == 2 * SENT_BYTES
            assert b.metric("kv_retention_ratio_sum") == pytest.approx(0.2)
            assert b.metric("prompt_tokens_total") == 100
            assert b.metric("visual_tokens_sum") == 80
            assert b.metric("generation_tokens_total") == 6
            assert b.metric("tenant_kv_bytes_full_total", tenant="default") == 2 * FULL_BYTES
            assert b.metric("tenant_kv_bytes_saved_total", tenant="default") == 2 * (FULL_BYTES - KEPT_BYTES)
            assert b.metric("stage_seconds_count", stage="admit") == 2
            totals = (await b.stub.GetServerInfo(pb.GetServerInfoRequest())).totals
            assert (totals.requests, totals.kv_full_bytes) == (2, 2 * FULL_BYTES)

    run(main)
