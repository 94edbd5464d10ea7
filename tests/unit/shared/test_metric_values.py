"""Label values that metrics start with are those that services use: a wrong one would stay 0 for ever."""

from __future__ import annotations

from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as public

from prefill_worker.guard import outcome_name
from router import accounting, shadow, stages
from router.requests import recovery
from router.workers.token_stream import STREAM_BROKE
from shared import errors
from shared.telemetry.metrics import ENDINGS, FAILOVERS, PrefillMetrics, RouterMetrics

ROUTER = RouterMetrics(worker="r0")
PREFILL = PrefillMetrics(worker="p0", model="toy")
OUTCOMES = {accounting.FINISHED, accounting.CANCELLED, accounting.FAILED, accounting.REFUSED, accounting.REPEATED}
GUARDS = {number for number in public.GuardOutcome.values() if number}


def values(metrics: RouterMetrics | PrefillMetrics, name: str, label: str) -> set[str]:
    families = [family for family in metrics.registry.collect() if family.name == f"vlcache_{name}"]
    return {sample.labels[label] for family in families for sample in family.samples}


@pytest.mark.parametrize(
    ("metrics", "name", "label", "used"),
    [
        (ROUTER, "requests", "outcome", OUTCOMES),
        (ROUTER, "cancellations", "stage", {stages.QUEUE, stages.PREFILL, stages.TRANSFER, stages.DECODE}),
        (ROUTER, "shadow_requests", "outcome", {shadow.COMPARED, shadow.DROPPED, shadow.FAILED}),
        (ROUTER, "failovers", "kind", {recovery.RESEND, recovery.REPREFILL, recovery.MIGRATION}),
        (PREFILL, "guard", "outcome", {outcome_name(number) for number in GUARDS}),
    ],
)
def test_a_metric_starts_with_all_values_of_a_closed_set(metrics: Any, name: str, label: str, used: set[str]) -> None:
    assert values(metrics, name, label) == used


def test_open_sets_start_with_values_that_exist() -> None:
    codes = {error.code for error in vars(errors).values() if isinstance(error, type) and hasattr(error, "code")}
    assert {code for _, code in ENDINGS} - {"OK"} <= codes
    reasons = {STREAM_BROKE, errors.UnavailableError.default_reason, "DRAINING"}
    assert {reason for _, reason in FAILOVERS} <= reasons
    assert values(ROUTER, "reservation_rejected", "reason") == {"KV_FULL", errors.TooLargeError.default_reason}
