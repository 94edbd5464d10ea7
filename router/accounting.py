"""Every observation of the router, in one place: metrics, and the totals that GetServerInfo shows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from vlcache.v1 import inference_pb2 as pb

from router.admission.tenant_labels import TenantLabels
from router.admission.tenants import DEFAULT_TENANT
from router.summary import Summary, write_access_line
from router.workers.circuit import CIRCUIT_STATES
from router.workers.worker import DECODE, STATES, UNREACHABLE, Worker, reported_load
from shared.errors import (
    DeadlineExceededError,
    InternalError,
    RequestCancelledError,
    ResourceExhaustedError,
    ServiceError,
)
from shared.telemetry.metrics import BEGUN, NOT_BEGUN, RouterMetrics
from shared.telemetry.role_metrics import Metric
from shared.telemetry.scope import current, within

OK = "OK"
FINISHED, CANCELLED, FAILED, REFUSED, REPEATED = "finished", "cancelled", "failed", "refused", "repeated"


@dataclass
class Totals:
    """Sums since the router started; KV in bytes."""

    requests: int = 0
    generated_tokens: int = 0
    kv_full_bytes: int = 0
    kv_kept_bytes: int = 0
    kv_sent_bytes: int = 0


class Accounting:
    """Owner of the router's metrics and totals.

    Args:
        report: Is told of every request that has ended.
    """

    def __init__(
        self,
        metrics: RouterMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        report: Callable[[Summary], None] = write_access_line,
    ) -> None:
        self.metrics = metrics
        self.clock = clock
        self.report = report
        self.totals = Totals()
        self.requests_running = 0
        self.requests_waiting = 0
        """Of those that run, for decode memory."""
        self._tenant_labels = TenantLabels()
        self._state_gauges = ((metrics.worker_state, STATES), (metrics.circuit_state, CIRCUIT_STATES))
        self._workers_shown: dict[str, tuple[str, str]] = {}
        self._heartbeats: dict[str, Worker] = {}

    def open(self, tenant: str = DEFAULT_TENANT, model: str = "") -> RequestAccount:
        """The account of a request of `tenant` that was just received and accepted."""
        self.totals.requests += 1
        return RequestAccount(self, tenant, model)

    def refused(self, error: ServiceError, tenant: str = DEFAULT_TENANT) -> None:
        """A request that was turned away before anything was done for it."""
        self.found_no_room(error, tenant)
        self.ended(Summary(tenant=tenant, outcome=REFUSED, code=error.code, reason=error.reason))

    def found_no_room(self, error: ServiceError, tenant: str) -> None:
        """A request of `tenant` ends in `error`; counted where that is for want of room or beyond its limits."""
        if isinstance(error, ResourceExhaustedError):
            label = self._tenant_labels.of(tenant)
            self.metrics.labelled(self.metrics.tenant_refused, tenant=label, reason=error.reason).inc()

    def of_tenant(self, metric: Metric, tenant: str) -> Metric:
        """The child of a metric that stands for `tenant`, perhaps together with others."""
        return self.metrics.labelled(metric, tenant=self._tenant_labels.of(tenant))

    def repeated(self, tenant: str = DEFAULT_TENANT) -> None:
        """A request was answered with what its first try was answered."""
        self.ended(Summary(tenant=tenant, outcome=REPEATED, code=OK))

    def reservation_rejected(self, error: ServiceError) -> None:
        """A decode worker did not promise memory."""
        self.metrics.labelled(self.metrics.reservation_rejected, reason=error.reason).inc()

    def admitted(self, seconds: float, *, prefill_worker: str, decode_worker: str) -> None:
        """A request was promised decode memory, `seconds` after it had asked for some."""
        self.metrics.observe_stage("admit", seconds, prefill_worker=prefill_worker, decode_worker=decode_worker)

    def reserved(self, share: Fraction) -> None:
        """A decode worker promised memory for `share` of what a request asked to keep."""
        if share < 1:
            self.metrics.retention_lowered.inc()
            self.metrics.retention_lowered_ratio.observe(float(share))

    def replayed(self, outcome: str) -> None:
        """A request of the shadow sample was answered once more, or was not."""
        self.metrics.labelled(self.metrics.shadow_requests, outcome=outcome).inc()

    def agreed(self, share: float) -> None:
        """`share` of an answer's tokens are those of the full cache."""
        self.metrics.shadow_agreement.observe(share)

    @contextlib.contextmanager
    def waiting(self, tenant: str = DEFAULT_TENANT) -> Iterator[None]:
        """Counts a request as waiting for decode memory while open."""
        since_s = self.clock()
        gauges = (self.metrics.requests_waiting, self.of_tenant(self.metrics.tenant_waiting, tenant))
        for gauge in gauges:
            gauge.inc()
        self.requests_waiting += 1
        try:
            yield
        finally:
            self.requests_waiting -= 1
            for gauge in gauges:
                gauge.dec()
            self.metrics.reservation_wait.observe(self.clock() - since_s)

    def show_served(self, models: int) -> None:
        """So many models have at least one ready pair."""
        self.metrics.served_models.set(models)

    def show_workers(self, workers: Iterable[Worker]) -> None:
        """Sets the gauges of workers as they are now; those that are gone disappear."""
        workers = list(workers)
        self._show_states_of(workers)
        self._show_heartbeats(workers)
        pools = [worker for worker in workers if worker.info.role == DECODE and worker.state != UNREACHABLE]
        capacity = sum(worker.capacity for worker in pools)
        self.metrics.cache_usage.set(sum(reported_load(pool.info) for pool in pools) / capacity if capacity else 0.0)

    def _show_heartbeats(self, workers: Iterable[Worker]) -> None:
        heard = {worker.info.name: worker for worker in workers}
        for name in self._heartbeats.keys() - heard.keys():
            self.metrics.forget(self.metrics.heartbeat_age, name)
        for name, worker in heard.items():
            if self._heartbeats.get(name) is not worker:
                # read when it is scraped: an age that somebody has to set would stand still when that one hangs
                age = self.metrics.labelled(self.metrics.heartbeat_age, name=name)
                age.set_function(partial(_silence_s, worker))
        self._heartbeats = heard

    def _show_states_of(self, workers: Iterable[Worker]) -> None:
        shown = {worker.info.name: (worker.state, worker.circuits.state) for worker in workers}
        for name in self._workers_shown.keys() - shown.keys():
            for gauge, states in self._state_gauges:
                for state in states:
                    self.metrics.forget(gauge, name, state)
        for name, states_now in shown.items():
            if self._workers_shown.get(name) != states_now:
                self._show_states(name, states_now)
        self._workers_shown = shown

    def _show_states(self, name: str, states_now: tuple[str, str]) -> None:
        for (gauge, states), is_now in zip(self._state_gauges, states_now, strict=True):
            for state in states:
                self.metrics.labelled(gauge, name=name, state=state).set(state == is_now)

    def ended(self, summary: Summary) -> None:
        """The request at work is over."""
        self.metrics.labelled(self.metrics.requests, outcome=summary.outcome, code=summary.code).inc()
        self.report(summary)
        span = current().span
        span.set(summary.known())
        span.end("" if summary.code == OK else summary.code)


class RequestAccount:
    """What is observed of one request, in the order of its life. Ends exactly once."""

    def __init__(self, accounting: Accounting, tenant: str, model: str) -> None:
        self._accounting = accounting
        # it may be ended by anyone
        self._scope = current()
        self._summary = Summary(tenant=tenant, model=model)
        self._metrics = accounting.metrics
        self._tenant = tenant
        self._running = (
            self._metrics.requests_running,
            accounting.of_tenant(self._metrics.tenant_running, tenant),
        )
        self._tenant_tokens = accounting.of_tenant(self._metrics.tenant_tokens, tenant)
        self._tenant_kv_full = accounting.of_tenant(self._metrics.tenant_kv_full, tenant)
        self._tenant_kv_saved = accounting.of_tenant(self._metrics.tenant_kv_saved, tenant)
        self._received_s = accounting.clock()
        self._first_s = self._last_s = self._received_s
        # of each answer, by choice: its tokens, and when the last of them came
        self._counts: dict[int, int] = {}
        self._heard_s: dict[int, float] = {}
        self._interrupted_s: float | None = None
        self._has_second = False
        self._open = True
        self.generated_tokens = 0
        accounting.requests_running += 1
        for gauge in self._running:
            gauge.inc()

    def prompt(self, prompt_tokens: int, visual_tokens: int) -> None:
        """The prompt's size is known."""
        self._summary.prompt_tokens, self._summary.visual_tokens = prompt_tokens, visual_tokens
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.visual_tokens.observe(visual_tokens)

    def interrupted(self) -> None:
        """A worker was lost, or is left: until the next token nothing comes for this request."""
        if self._interrupted_s is None:
            self._interrupted_s = self._accounting.clock()

    def placed(self, prefill_worker: str, decode_worker: str) -> None:
        """It is on this pair of workers from now on."""
        self._summary.prefill_worker, self._summary.decode_worker = prefill_worker, decode_worker

    def goes_on(self, way: str, reason: str, worker: str) -> None:
        """It goes on elsewhere, by one of the ways of `router.requests.recovery`, since `worker` was lost or leaves."""
        self._metrics.labelled(self._metrics.failovers, kind=way, reason=reason).inc()
        self._summary.failovers += 1
        self._scope.span.event("failover", {"kind": way, "reason": reason, "worker": worker})

    def tokens(self, count: int, choice: int = 0) -> None:
        """`count` tokens of one answer arrived together; the gap before them is shared out evenly."""
        now_s = self._accounting.clock()
        if count and self._interrupted_s is not None:
            answer = BEGUN if self.generated_tokens else NOT_BEGUN
            failover = self._metrics.labelled(self._metrics.failover_seconds, answer=answer)
            failover.observe(now_s - self._interrupted_s)
            self._interrupted_s = None
        gap_s = (now_s - self._heard_s.get(choice, self._received_s)) / max(1, count)
        for _ in range(count):
            self.generated_tokens += 1
            self._counts[choice] = self._counts.get(choice, 0) + 1
            self._token(self._counts[choice], gap_s, now_s)
        self._last_s = self._heard_s[choice] = now_s
        self._tenant_tokens.inc(count)
        self._accounting.totals.generated_tokens += count

    def compression(self, message: pb.Compression) -> None:
        """The prompt's KV was compressed."""
        self._metrics.kv_full_bytes.inc(message.full_bytes)
        self._metrics.kv_kept_bytes.inc(message.kept_bytes)
        saved_bytes = max(0, message.full_bytes - message.kept_bytes)
        self._metrics.kv_saved_bytes.inc(saved_bytes)
        self._tenant_kv_full.inc(message.full_bytes)
        self._tenant_kv_saved.inc(saved_bytes)
        self._metrics.kv_retention.observe(message.realised_retention)
        summary = self._summary
        summary.policy, summary.retention = message.policy, message.realised_retention
        summary.retention_asked = message.asked_retention
        summary.kv_full_bytes, summary.kv_kept_bytes = message.full_bytes, message.kept_bytes
        self._accounting.totals.kv_full_bytes += message.full_bytes
        self._accounting.totals.kv_kept_bytes += message.kept_bytes

    def transfer(self, message: pb.Transfer) -> None:
        """The parcel was sent."""
        self._metrics.kv_sent_bytes.inc(message.sent_bytes)
        self._summary.transport = message.transport
        self._summary.kv_sent_bytes = (self._summary.kv_sent_bytes or 0) + message.sent_bytes
        self._accounting.totals.kv_sent_bytes += message.sent_bytes

    def finished(self) -> None:
        """The answer is complete."""
        if self._end(FINISHED, OK):
            self._metrics.e2e_latency.observe(self._last_s - self._received_s)
            longest = max(self._counts.values(), default=0)
            if longest > 1:
                per_token_s = (self._last_s - self._first_s) / (longest - 1)
                self._metrics.time_per_output_token.observe(per_token_s)

    def failed(self, error: Exception) -> None:
        """The client is told of an error; one that is no `ServiceError` is a bug."""
        known = error if isinstance(error, ServiceError) else InternalError("a bug")
        if self._end(FAILED, known.code, known.reason):
            self._accounting.found_no_room(known, self._tenant)

    def left(self, stage: str, deadline: DeadlineExceededError | None) -> None:
        """The client went away in `stage`; `deadline` says that it did so because its time was over."""
        if deadline is not None:
            self.failed(deadline)
        elif self._end(CANCELLED, RequestCancelledError.code):
            self._metrics.labelled(self._metrics.cancellations, stage=stage).inc()

    def _token(self, number: int, gap_s: float, now_s: float) -> None:
        """Number `number` of its answer, from 1."""
        self._metrics.generation_tokens.inc()
        if self.generated_tokens == 1:
            self._first_s = now_s
            self._metrics.time_to_first_token.observe(now_s - self._received_s)
            self._scope.span.event("first_token", {})
        if number > 1:
            self._metrics.inter_token_latency.observe(gap_s)
        if number == 2 and not self._has_second:
            self._has_second = True
            self._metrics.time_to_second_token.observe(now_s - self._received_s)

    def _end(self, outcome: str, code: str, reason: str = "") -> bool:
        if not self._open:
            return False
        self._open = False
        self._accounting.requests_running -= 1
        for gauge in self._running:
            gauge.dec()
        summary = self._summary
        summary.outcome, summary.code, summary.reason = outcome, code, reason
        summary.generated_tokens = self.generated_tokens
        summary.first_token_s = self._first_s - self._received_s if self.generated_tokens else None
        summary.total_s = self._accounting.clock() - self._received_s
        with within(self._scope):
            self._accounting.ended(summary)
        return True


def _silence_s(worker: Worker) -> float:
    return worker.clock() - worker.heard_s
