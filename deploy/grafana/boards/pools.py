"""Memory and the leases on it: what is promised, filling, active, retained, and what nobody owns."""

from __future__ import annotations

from deploy.grafana.panel import (
    BYTES,
    COUNT,
    FULL,
    PER_S,
    RATIO,
    SECONDS,
    Board,
    Panel,
    Query,
    heatmap,
    number,
    quantile,
    rate,
)

POOLS = Board(
    uid="vlcache-pools",
    title="vlcache: pools and leases",
    text="Memory of the workers, who holds it, and what came back late.",
    panels=(
        number(
            "Orphaned bytes",
            "sum (vlcache_kv_orphan_bytes)",
            "Held for what has ended. Anything that stays is a bug.",
            BYTES,
        ),
        number(
            "Expired leases",
            "sum (vlcache_lease_expired_total)",
            "Since the start: somebody died, or was cut off, before it could release.",
            COUNT,
        ),
        number(
            "Waiting for memory",
            'sum (vlcache_num_requests_waiting{role="router"})',
            "Requests in the router that no decode worker has room for.",
            COUNT,
        ),
        Panel(
            title="KV bytes by state",
            text="Decode: `reserved` is promised, `filling` arrives, `active` runs, `parked` waits in host memory."
            " Prefill: `filling` is computed or sent, `retained` is kept for failover. All 0 without requests.",
            unit=BYTES,
            kind="stack",
            width=FULL,
            queries=(Query("sum by (role, state) (vlcache_kv_resident_bytes)", "{{role}} {{state}}"),),
        ),
        Panel(
            title="Usage",
            text="Share in use of each decode worker's KV pool and of each prefill worker's memory for parcels.",
            unit=RATIO,
            queries=(Query('max by (worker) (vlcache_kv_cache_usage_ratio{role!="router"})', "{{worker}}"),),
        ),
        Panel(
            title="Fragmentation",
            text="Share of a pool's free bytes that one sequence cannot have.",
            unit=RATIO,
            queries=(Query("max by (worker) (vlcache_kv_fragmentation_ratio)", "{{worker}}"),),
        ),
        Panel(
            title="Orphaned bytes by worker",
            text="Peaks of a moment are threads that let go of what was cancelled.",
            unit=BYTES,
            queries=(Query("sum by (worker) (vlcache_kv_orphan_bytes)", "{{worker}}"),),
        ),
        Panel(
            title="Expired leases",
            text="`decode`: reservations that nobody renewed. `prefill`: retained parcels that no router released.",
            unit=PER_S,
            queries=(Query(rate("vlcache_lease_expired_total", "side"), "{{side}}"),),
        ),
        Panel(
            title="Refused reservations",
            text="`KV_FULL` for now, `TOO_LARGE` for ever.",
            unit=PER_S,
            queries=(Query(rate("vlcache_reservation_rejected_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            title="Sequences moved out of the pool",
            text="`outgrown`: more tokens than were promised. `evicted`: someone older needed the memory.",
            unit=PER_S,
            queries=(Query(rate("vlcache_preemptions_total", "reason"), "{{reason}}"),),
        ),
        heatmap("Wait for decode memory", "vlcache_reservation_wait_seconds", "Of requests that had to wait."),
        Panel(
            title="Below the retention asked for",
            text="Reservations per second that were lowered for want of memory, where requests allow it.",
            unit=PER_S,
            queries=(Query(rate("vlcache_retention_lowered_total"), "lowered"),),
        ),
        Panel(
            title="Caches of the prefill workers",
            text="Features of images, and KV of prompts up to their last image.",
            unit=BYTES,
            queries=(
                Query("sum (vlcache_vision_cache_bytes)", "vision"),
                Query("sum (vlcache_prefix_cache_bytes)", "prefix"),
            ),
        ),
        Panel(
            title="Cache hits",
            text="Images and prompts whose computation was spared, per second.",
            unit=PER_S,
            queries=(
                Query(rate("vlcache_vision_cache_hits_total"), "vision hits"),
                Query(rate("vlcache_vision_cache_misses_total"), "vision misses"),
                Query(rate("vlcache_prefix_cache_hits_total"), "prefix hits"),
                Query(rate("vlcache_prefix_cache_misses_total"), "prefix misses"),
            ),
        ),
        Panel(
            title="Steps, 99th percentile",
            text="One step of a decode worker's batch.",
            unit=SECONDS,
            queries=(Query(quantile(0.99, "vlcache_decode_step_seconds", "worker"), "{{worker}}"),),
        ),
        heatmap("Batch", "vlcache_decode_batch_size", "Sequences in a step.", COUNT),
    ),
)
