"""Every metric of every role: names, labels, buckets. Prefix `vlcache_`, base units, ratios 0-1.

Each process builds the class of each of its roles and hands it down; `registry` is what its /metrics port shows. What
clients name never becomes a label as it is: tenants are bounded (`TenantLabels`), models are those of workers.
"""

from __future__ import annotations

from collections.abc import Callable

from shared.telemetry.role_metrics import (
    LATENCY_BUCKETS,
    PIXEL_BUCKETS,
    RATIO_BUCKETS,
    STAGE_BUCKETS,
    TOKEN_BUCKETS,
    TOKEN_GAP_BUCKETS,
    RoleMetrics,
)

# How requests end where all is well and where clients are at fault, and the failures that say that something is not.
ENDINGS = (
    ("finished", "OK"),
    ("repeated", "OK"),
    ("cancelled", "CANCELLED"),
    ("refused", "RESOURCE_EXHAUSTED"),
    ("failed", "RESOURCE_EXHAUSTED"),
    ("failed", "DEADLINE_EXCEEDED"),
    ("failed", "UNAVAILABLE"),
    ("failed", "INTERNAL"),
)
# What a failover met: an answer whose client has tokens already, or one that is still awaited.
BEGUN, NOT_BEGUN = "begun", "not_begun"
FAILOVERS = (("resend", "DECODE_WORKER_LOST"), ("reprefill", "UNAVAILABLE"), ("migration", "DRAINING"))


class RouterMetrics(RoleMetrics):
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
        self.requests = c("requests_total", "Requests ended", "outcome", "code", starts=ENDINGS)
        self.cancellations = c(
            "cancellations_total",
            "Requests cancelled by their client",
            "stage",
            starts=("queue", "prefill", "transfer", "decode"),
        )
        self.reservation_rejected = c(
            "reservation_rejected_total", "Refused reservations", "reason", starts=("KV_FULL", "TOO_LARGE")
        )
        self.reservation_wait = h("reservation_wait_seconds", "Time in the queue for decode memory", LATENCY_BUCKETS)
        self.retention_lowered = c("retention_lowered_total", "Reservations below the retention asked for")
        self.retention_lowered_ratio = h(
            "retention_lowered_ratio", "Share of the retention asked for that these got", RATIO_BUCKETS
        )
        self.shadow_requests = c(
            "shadow_requests_total",
            "Finished requests sampled to be repeated",
            "outcome",
            starts=("compared", "dropped", "failed"),
        )
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
            starts=FAILOVERS,
        )
        self.failover_seconds = h(
            "failover_seconds",
            "Loss of a worker noticed, or a leaving one left, to next token: a pause where the answer had begun, and"
            " where it had not all of what its first token still takes",
            LATENCY_BUCKETS,
            "answer",
            starts=(BEGUN, NOT_BEGUN),
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
        self.tenant_kv_full = c(
            "tenant_kv_bytes_full_total", "KV bytes of a tenant's prompts before compression", "tenant"
        )
        self.tenant_kv_saved = c("tenant_kv_bytes_saved_total", "KV bytes of a tenant's prompts not kept", "tenant")
        self.kv_full_bytes = c("kv_bytes_full_total", "KV bytes of all prompts before compression")
        self.kv_kept_bytes = c("kv_bytes_kept_total", "KV bytes kept")
        self.kv_sent_bytes = c("kv_bytes_sent_total", "Bytes handed to the transports: parcels, manifests, framing")
        self.kv_saved_bytes = c("kv_bytes_saved_total", "KV bytes never sent nor stored by decode workers")
        self.kv_retention = h("kv_retention_ratio", "Realised retention of a prompt", RATIO_BUCKETS)
        self.prompt_tokens = c("prompt_tokens_total", "Prompt tokens, visual and text")
        self.generation_tokens = c("generation_tokens_total", "Generated tokens")
        self.visual_tokens = h("visual_tokens", "Visual tokens of a prompt", TOKEN_BUCKETS)
        self.cache_usage = g("kv_cache_usage_ratio", "Share in use of the KV pools of the decode workers that answer")
        self.served_models = g("served_models", "Models that at least one ready pair of workers serves")
        self.heartbeat_age = g("worker_heartbeat_age_seconds", "Time since a worker last answered a poll", "name")
        self.worker_state = g("worker_state", "1 for the state a worker is in", "name", "state")
        self.circuit_state = g("circuit_state", "1 for the state of a worker's worst circuit", "name", "state")


class WorkerMetrics(RoleMetrics):
    """What both kinds of worker have."""

    def __init__(self, *, role: str, worker: str, model: str) -> None:
        super().__init__(role=role, worker=worker, model=model)
        self.requests_running = self._gauge("num_requests_running", "Requests being computed")
        self.requests_waiting = self._gauge("num_requests_waiting", "Requests admitted and waiting")
        self.cache_usage = self._gauge(
            "kv_cache_usage_ratio", "Share in use of the KV pool (decode) or of the memory for parcels (prefill)"
        )
        self.resident_bytes = self._gauge("kv_resident_bytes", "KV bytes by state", "state")
        self.orphan_bytes = self._gauge(
            "kv_orphan_bytes", "Bytes still held for what has ended: 0 but for the moment in which a thread lets go"
        )

    def watch_resident(self, state: str, read: Callable[[], float]) -> None:
        """Lets the gauge of `state` read its owner at scrape time."""
        self.labelled(self.resident_bytes, state=state).set_function(read)


class PrefillMetrics(WorkerMetrics):
    """What a prefill worker sees: compute, compression, transfer."""

    def __init__(self, *, worker: str, model: str) -> None:
        super().__init__(role="prefill", worker=worker, model=model)
        h, c = self._histogram, self._counter
        self.outstanding_tokens = self._gauge(
            "outstanding_tokens", "Prompt tokens, visual and text, that wait for the model or are computed"
        )
        self.attention_mass = h(
            "kv_kept_attention_mass_ratio", "Post-vision attention mass on kept tokens, mean over layers", RATIO_BUCKETS
        )
        self.guard = c(
            "guard_total",
            "Parcels that the quality guard has looked at",
            "outcome",
            starts=("kept", "grown", "full", "refused"),
        )
        self.prefill_peak = h("kv_prefill_peak_ratio", "Most KV held during a pass, over the prompt's", RATIO_BUCKETS)
        self.layer_retention = self._gauge("kv_layer_retention_ratio", "Kept share of the last prompt", "layer")
        self.transfer_seconds = h("kv_transfer_seconds", "Commit of a parcel", STAGE_BUCKETS, "transport")
        self.transfer_bytes = c("kv_transfer_bytes_total", "Bytes handed to a transport", "transport")
        self.transfer_failures = c("kv_transfer_failures_total", "Failed transfers", "reason", starts=("UNAVAILABLE",))
        self.resends = c("kv_resend_total", "Parcels sent once more", "reason", starts=("data_loss", "failover"))
        self.lease_expired = c("lease_expired_total", "Leases that ended unrenewed", "side", starts=("prefill",))
        self.queue_time = h("request_queue_time_seconds", "A prompt's wait for the prompts before it", LATENCY_BUCKETS)
        self.image_pixels = h("image_pixels", "Pixels of an image as sent", PIXEL_BUCKETS)
        self.preprocess_replaced = c(
            "preprocess_replaced_total",
            "Replaced preprocessing processes",
            "reason",
            starts=("start", "ended", "timeout", "crash"),
        )
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
        self.fragmentation = self._gauge(
            "kv_fragmentation_ratio", "Share of the pool's free bytes that one sequence cannot have"
        )
        self.saved_bytes = self._gauge(
            "kv_resident_saved_bytes", "What the sequences in the KV pool would need on top with their whole prompts"
        )
        self.preemptions = self._counter(
            "preemptions_total",
            "Sequences that were moved out of the KV pool",
            "reason",
            starts=("evicted", "outgrown"),
        )
        self.lease_expired = self._counter(
            "lease_expired_total", "Leases that ended unrenewed", "side", starts=("decode",)
        )
        self.replayed_tokens = self._counter("replayed_tokens_total", "Delivered tokens that were fed again")
        self.step_seconds = self._histogram("decode_step_seconds", "One step of the running batch", STAGE_BUCKETS)
        self.batch_size = self._histogram("decode_batch_size", "Sequences in a step", (1, 2, 4, 8, 16, 32, 64, 128))
