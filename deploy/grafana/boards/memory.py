"""KV memory saved: what the full cache would have needed, and what was kept of it."""

from __future__ import annotations

from deploy.grafana.panel import (
    BYTES,
    BYTES_PER_S,
    COUNT,
    FULL,
    RATIO,
    Board,
    Panel,
    Query,
    heatmap,
    number,
    quantile,
    rate,
)

ACTIVE = 'sum (vlcache_kv_resident_bytes{role="decode",state="active"})'
SAVED = "sum (vlcache_kv_resident_saved_bytes)"

MEMORY = Board(
    uid="vlcache-memory",
    title="vlcache: KV memory saved",
    text="What compression spares: memory of decode workers, and bytes between workers.",
    panels=(
        number(
            "Saved since the start",
            "sum (vlcache_kv_bytes_saved_total)",
            "KV bytes of prompts that were never sent nor stored by a decode worker.",
            BYTES,
        ),
        number(
            "Kept",
            "sum (vlcache_kv_bytes_kept_total) / sum (vlcache_kv_bytes_full_total)",
            "Share of all prompts' KV that was kept; what requests ask for with `retention`.",
            RATIO,
        ),
        number(
            "Times smaller",
            "sum (vlcache_kv_bytes_full_total) / sum (vlcache_kv_bytes_kept_total)",
            "The full cache of all prompts over what was kept of them.",
            COUNT,
        ),
        Panel(
            title="Prompts: the full cache and what was kept",
            text="KV bytes of the prompts that came per second.",
            unit=BYTES_PER_S,
            queries=(
                Query(rate("vlcache_kv_bytes_full_total"), "full cache"),
                Query(rate("vlcache_kv_bytes_kept_total"), "kept"),
            ),
        ),
        Panel(
            title="Running sequences: the full cache and what they hold",
            text="Memory of the decode workers' running sequences, and what the same sequences would need with their"
            " whole prompts.",
            unit=BYTES,
            queries=(Query(f"{ACTIVE} + {SAVED}", "full cache"), Query(ACTIVE, "held")),
        ),
        Panel(
            title="Retention by layer",
            text="Kept share of the last prompt in each layer: where a policy spends its budget. Repetitions for the"
            " shadow sample keep everything.",
            unit=RATIO,
            queries=(Query("avg by (layer) (vlcache_kv_layer_retention_ratio)", "layer {{layer}}"),),
        ),
        Panel(
            title="Saved by tenant",
            text="KV bytes per second that each tenant's prompts did not need.",
            unit=BYTES_PER_S,
            kind="stack",
            queries=(Query(rate("vlcache_tenant_kv_bytes_saved_total", "tenant"), "{{tenant}}"),),
        ),
        Panel(
            title="Saved share by tenant",
            text="Of each tenant's prompts' KV, since the start.",
            unit=RATIO,
            queries=(
                Query(
                    "sum by (tenant) (vlcache_tenant_kv_bytes_saved_total)"
                    " / sum by (tenant) (vlcache_tenant_kv_bytes_full_total)",
                    "{{tenant}}",
                ),
            ),
        ),
        Panel(
            title="Most KV held during a pass, median",
            text="Over the prompt's KV: 100 % unless a pass gives rows up on its way (`--cascade`, sparse prefill).",
            unit=RATIO,
            queries=(Query(quantile(0.5, "vlcache_kv_prefill_peak_ratio", "worker"), "{{worker}}"),),
        ),
        heatmap("Retention", "vlcache_kv_retention_ratio", "Kept share of each prompt's KV.", RATIO, FULL),
    ),
)
