"""Every metric of every service: names, labels, buckets. Prefix `vlcache_`, base units, ratios 0-1.

Each process builds the one class of its role and hands it down; `registry` is what its /metrics port shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from shared.version import VERSION

Metric = TypeVar("Metric", Counter, Gauge, Histogram)


def geometric_buckets(low_s: float, high_s: float) -> tuple[float, ...]:
    """1, 2.2, 4.7, 10 ... from `low_s` to `high_s`, the ends included."""
    steps = [base * 10.0**power for power in range(-6, 6) for base in (1.0, 2.2, 4.7)]
    inner = [round(step, 9) for step in steps if low_s < step < high_s]
    return (low_s, *inner, high_s)


LATENCY_BUCKETS = geometric_buckets(0.001, 480.0)
TOKEN_GAP_BUCKETS = geometric_buckets(0.001, 80.0)
STAGE_BUCKETS = geometric_buckets(0.0001, 480.0)
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
TOKEN_BUCKETS = (0, 64, 256, 576, 1152, 2304, 4608, 9216, 18432, 36864, 73728, 147456)
PIXEL_BUCKETS = (1e4, 1e5, 2.5e5, 5e5, 1e6, 2e6, 4e6, 8e6, 1.6e7, 4e7)


class _RoleMetrics:
    """Metrics of one process; binds the labels that never change in it."""

    def __init__(self, *, role: str, worker: str, model: str = "") -> None:
        self.registry = CollectorRegistry()
        self._fixed = {"role": role, "worker": worker, "model": model}
        info = Info("vlcache_build", "Version of this process", registry=self.registry)
        info.info({"version": VERSION, **self._fixed})
        self.event_loop_delay = self._histogram(
            "event_loop_delay_seconds", "How late the event loop woke up", STAGE_BUCKETS
        )

    def _names(self, extra: Sequence[str]) -> list[str]:
        return [*self._fixed, *extra]

    def _counter(self, name: str, text: str, *extra: str) -> Counter:
        metric = Counter(f"vlcache_{name}", text, self._names(extra), registry=self.registry)
        return metric if extra else metric.labels(**self._fixed)

    def _gauge(self, name: str, text: str, *extra: str) -> Gauge:
        metric = Gauge(f"vlcache_{name}", text, self._names(extra), registry=self.registry)
        return metric if extra else metric.labels(**self._fixed)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *extra: str) -> Histogram:
        metric = Histogram(f"vlcache_{name}", text, self._names(extra), registry=self.registry, buckets=buckets)
        return metric if extra else metric.labels(**self._fixed)

    def labelled(self, metric: Metric, **extra: str) -> Metric:
        """The child of a metric that has labels beyond the fixed ones."""
        return metric.labels(**self._fixed, **extra)

    def forget(self, metric: Counter | Gauge | Histogram, *values: str) -> None:
        """Drops the child with these values of the extra labels: what it was about does not exist any more."""
        metric.remove(*self._fixed.values(), *values)


class RouterMetrics(_RoleMetrics):
    """What only the router sees: whole requests."""

    def __init__(self, *, worker: str) -> None:
        super().__init__(role="router", worker=worker)
        h, c, g = self._histogram, self._counter, self._gauge
        self.time_to_first_token = h("time_to_first_token_seconds", "Request received to first token", LATENCY_BUCKETS)
        self.time_to_second_token = h(
            "time_to_second_token_seconds", "Request received to second token: shows the hand-off", LATENCY_BUCKETS
        )
        self.inter_token_latency = h("inter_token_latency_seconds", "Gap between two tokens", TOKEN_GAP_BUCKETS)
        self.time_per_output_token = h(
            "request_time_per_output_token_seconds", "(E2E - TTFT) / (tokens - 1) of a request", TOKEN_GAP_BUCKETS
        )
        self.e2e_latency = h("e2e_request_latency_seconds", "Request received to last token", LATENCY_BUCKETS)
        self.requests = c("requests_total", "Requests ended", "outcome", "code")
        self.cancellations = c("cancellations_total", "Requests cancelled by their client", "stage")
        self.reservation_rejected = c("reservation_rejected_total", "Refused reservations", "reason")
        self.reservation_wait = h("reservation_wait_seconds", "Time in the queue for decode memory", LATENCY_BUCKETS)
        self.retention_lowered = c("retention_lowered_total", "Reservations below the retention asked for")
        self.retention_lowered_ratio = h(
            "retention_lowered_ratio", "Share of the retention asked for that these got", RATIO_BUCKETS
        )
        self.shadow_requests = c("shadow_requests_total", "Finished requests sampled to be repeated", "outcome")
        self.shadow_agreement = h(
            "shadow_agreement_ratio",
            "Share of an answer's tokens but the first that retention 1 draws too",
            RATIO_BUCKETS,
        )
        self.failovers = c(
            "failovers_total",
            "Times that an answer went on elsewhere: by its parcel sent again (resend), its prompt computed again"
            " (reprefill), or ahead of a drain (migration)",
            "kind",
            "reason",
        )
        self.failover_seconds = h(
            "failover_seconds", "Loss of a worker noticed, or a leaving one left, to next token", LATENCY_BUCKETS
        )
        self.requests_running = g("num_requests_running", "Requests in flight")
        self.requests_waiting = g("num_requests_waiting", "Requests waiting for decode memory")
        self.tenant_running = g("tenant_requests_running", "Requests of a tenant in flight", "tenant")
        self.tenant_waiting = g("tenant_requests_waiting", "Requests of a tenant waiting for decode memory", "tenant")
        self.tenant_refused = c(
            "tenant_requests_refused_total",
            "Requests refused for want of room, or beyond what a tenant may ask for",
            "tenant",
            "reason",
        )
        self.tenant_tokens = c("tenant_generation_tokens_total", "Tokens generated for a tenant", "tenant")
        self.kv_full_bytes = c("kv_bytes_full_total", "KV bytes of all prompts before compression")
        self.kv_kept_bytes = c("kv_bytes_kept_total", "KV bytes kept")
        self.kv_sent_bytes = c("kv_bytes_sent_total", "Bytes handed to the transports: parcels, manifests, framing")
        self.kv_saved_bytes = c("kv_bytes_saved_total", "KV bytes never sent nor stored by decode workers")
        self.kv_retention = h("kv_retention_ratio", "Realised retention of a prompt", RATIO_BUCKETS)
        self.prompt_tokens = c("prompt_tokens_total", "Prompt tokens, visual and text")
        self.generation_tokens = c("generation_tokens_total", "Generated tokens")
        self.visual_tokens = h("visual_tokens", "Visual tokens of a prompt", TOKEN_BUCKETS)
        self.worker_state = g("worker_state", "1 for the state a worker is in", "name", "state")
        self.circuit_state = g("circuit_state", "1 for the state of a worker's worst circuit", "name", "state")


class WorkerMetrics(_RoleMetrics):
    """What both kinds of worker have."""

    def __init__(self, *, role: str, worker: str, model: str) -> None:
        super().__init__(role=role, worker=worker, model=model)
        self.requests_running = self._gauge("num_requests_running", "Requests being computed")
        self.requests_waiting = self._gauge("num_requests_waiting", "Requests admitted and waiting")
        self.stage_seconds = self._histogram("stage_seconds", "Time spent in a stage", STAGE_BUCKETS, "stage")
        self.resident_bytes = self._gauge("kv_resident_bytes", "KV bytes by state", "state")

    def watch_resident(self, state: str, read: Callable[[], float]) -> None:
        """Lets the gauge of `state` read its owner at scrape time."""
        self.resident_bytes.labels(**self._fixed, state=state).set_function(read)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Adds one duration to a stage."""
        self.stage_seconds.labels(**self._fixed, stage=stage).observe(seconds)


class PrefillMetrics(WorkerMetrics):
    """What a prefill worker sees: compute, compression, transfer."""

    def __init__(self, *, worker: str, model: str) -> None:
        super().__init__(role="prefill", worker=worker, model=model)
        h, c = self._histogram, self._counter
        self.attention_mass = h(
            "kv_kept_attention_mass_ratio", "Post-vision attention mass on kept tokens, mean over layers", RATIO_BUCKETS
        )
        self.guard = c("guard_total", "Parcels that the quality guard has looked at", "outcome")
        self.prefill_peak = h("kv_prefill_peak_ratio", "Most KV held during a pass, over the prompt's", RATIO_BUCKETS)
        self.layer_retention = self._gauge("kv_layer_retention_ratio", "Kept share of the last prompt", "layer")
        self.transfer_seconds = h("kv_transfer_seconds", "Commit of a parcel", STAGE_BUCKETS, "transport")
        self.transfer_bytes = c("kv_transfer_bytes_total", "Bytes handed to a transport", "transport")
        self.transfer_failures = c("kv_transfer_failures_total", "Failed transfers", "reason")
        self.resends = c("kv_resend_total", "Parcels sent once more", "reason")
        self.lease_expired = c("lease_expired_total", "Leases that ended unrenewed", "side")
        self.image_pixels = h("image_pixels", "Pixels of an image as sent", PIXEL_BUCKETS)
        self.preprocess_replaced = c("preprocess_replaced_total", "Replaced preprocessing processes", "reason")
        self.vision_cache_hits = c("vision_cache_hits_total", "Images that the vision tower was spared")
        self.vision_cache_misses = c("vision_cache_misses_total", "Images that the vision tower encoded")
        self.vision_cache_bytes = self._gauge("vision_cache_bytes", "Kept features of images")
        self.prefix_cache_hits = c("prefix_cache_hits_total", "Prompts of which only the text after the images passed")
        self.prefix_cache_misses = c("prefix_cache_misses_total", "Prompts with images that passed whole")
        self.prefix_cache_bytes = self._gauge("prefix_cache_bytes", "Kept KV of prompts up to their last image")


class DecodeMetrics(WorkerMetrics):
    """What a decode worker sees: memory and steps."""

    def __init__(self, *, worker: str, model: str) -> None:
        super().__init__(role="decode", worker=worker, model=model)
        self.cache_usage = self._gauge("kv_cache_usage_ratio", "Share of the KV pool in use")
        self.fragmentation = self._gauge(
            "kv_fragmentation_ratio", "Share of the pool's free bytes that one sequence cannot have"
        )
        self.preemptions = self._counter("preemptions_total", "Sequences that were moved out of the KV pool", "reason")
        self.lease_expired = self._counter("lease_expired_total", "Leases that ended unrenewed", "side")
        self.replayed_tokens = self._counter("replayed_tokens_total", "Delivered tokens that were fed again")
        self.step_seconds = self._histogram("decode_step_seconds", "One step of the running batch", STAGE_BUCKETS)
        self.batch_size = self._histogram("decode_batch_size", "Sequences in a step", (1, 2, 4, 8, 16, 32, 64, 128))
