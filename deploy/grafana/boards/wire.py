"""Bytes between prefill and decode workers: what a full cache would have been, and what was sent."""

from __future__ import annotations

from deploy.grafana.panel import (
    BYTES,
    BYTES_PER_S,
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

WIRE = Board(
    uid="vlcache-wire",
    title="vlcache: bytes on the wire",
    text="Full cache and parcels between prefill and decode workers.",
    panels=(
        number(
            "Sent since the start",
            "sum (vlcache_kv_bytes_sent_total)",
            "Bytes handed to transports: parcels, manifests, framing.",
            BYTES,
        ),
        number(
            "Full cache of the same prompts",
            "sum (vlcache_kv_bytes_full_total)",
            "What a transfer without compression would have sent.",
            BYTES,
        ),
        number(
            "Sent share",
            "sum (vlcache_kv_bytes_sent_total) / sum (vlcache_kv_bytes_full_total)",
            "Less than the kept share where parcels are encoded.",
            RATIO,
        ),
        Panel(
            title="Full, kept and sent",
            text="Per second. Between full and kept lies compression, between kept and sent the encoding of parcels.",
            unit=BYTES_PER_S,
            queries=(
                Query(rate("vlcache_kv_bytes_full_total"), "full cache"),
                Query(rate("vlcache_kv_bytes_kept_total"), "kept"),
                Query(rate("vlcache_kv_bytes_sent_total"), "sent"),
            ),
        ),
        Panel(
            title="By transport",
            text="`memory` within a host, `local` within a process, `grpc` between hosts. A transport that should not"
            " be there says that workers do not share a socket directory.",
            unit=BYTES_PER_S,
            kind="stack",
            queries=(Query(rate("vlcache_kv_transfer_bytes_total", "transport"), "{{transport}}"),),
        ),
        heatmap("Transfers", "vlcache_kv_transfer_seconds", "From handing a parcel over to its commit."),
        Panel(
            title="Transfers, 99th percentile",
            text="By transport.",
            unit=SECONDS,
            queries=(Query(quantile(0.99, "vlcache_kv_transfer_seconds", "transport"), "{{transport}}"),),
        ),
        Panel(
            title="Failed transfers",
            text="By the reason that the decode worker, or the way to it, gave.",
            unit=PER_S,
            queries=(Query(rate("vlcache_kv_transfer_failures_total", "reason"), "{{reason}}"),),
        ),
        Panel(
            title="Parcels sent once more",
            text="`failover`: a decode worker was lost. `data_loss`: bytes were damaged on their way.",
            unit=PER_S,
            queries=(Query(rate("vlcache_kv_resend_total", "reason"), "{{reason}}"),),
        ),
    ),
)
