"""Workers, as the routers see them."""

from __future__ import annotations

from deploy.grafana.panel import COUNT, PER_S, SECONDS, Board, Panel, Query, heatmap, number, quantile, rate

WORKERS = Board(
    uid="vlcache-workers",
    title="vlcache: workers and circuits",
    text="Who is there, who is not, and how answers went on without them.",
    panels=(
        number(
            "Models served",
            "min (vlcache_served_models)",
            "With at least one ready pair of workers, at the router that sees the fewest. 0: every request fails.",
            COUNT,
        ),
        number(
            "Workers not ready",
            'sum (max by (name) (vlcache_worker_state{state!="ready"}))',
            "Draining or unreachable for at least one router.",
            COUNT,
        ),
        number(
            "Circuits not closed",
            'sum (max by (name) (vlcache_circuit_state{state!="closed"}))',
            "Workers that keep failing calls are left alone for a while.",
            COUNT,
        ),
        Panel(
            title="Workers by state",
            text="Summed over routers.",
            unit=COUNT,
            kind="stack",
            queries=(Query("sum by (state) (vlcache_worker_state)", "{{state}}"),),
        ),
        Panel(
            title="Circuits by state",
            text="The worst of each worker; `half_open` lets single requests try.",
            unit=COUNT,
            kind="stack",
            queries=(Query("sum by (state) (vlcache_circuit_state)", "{{state}}"),),
        ),
        Panel(
            title="Silence",
            text="Time since a worker last answered a poll, at the router that has waited the longest.",
            unit=SECONDS,
            queries=(Query("max by (name) (vlcache_worker_heartbeat_age_seconds)", "{{name}}"),),
        ),
        Panel(
            title="Event loop delay, 99th percentile",
            text="A late loop delays tokens and lease renewals of everybody in the process.",
            unit=SECONDS,
            queries=(Query(quantile(0.99, "vlcache_event_loop_delay_seconds", "worker"), "{{worker}}"),),
        ),
        Panel(
            title="Requests by worker",
            text="Running.",
            unit=COUNT,
            kind="stack",
            queries=(Query('sum by (worker) (vlcache_num_requests_running{role!="router"})', "{{worker}}"),),
        ),
        Panel(
            title="Requests that wait, by worker",
            text="For the model (prefill), for a place in the batch or for memory (decode).",
            unit=COUNT,
            kind="stack",
            queries=(Query('sum by (worker) (vlcache_num_requests_waiting{role!="router"})', "{{worker}}"),),
        ),
        Panel(
            title="Prompt tokens before each prefill worker",
            text="Waiting for the model or computed: what prefill workers are scaled on.",
            unit=COUNT,
            kind="stack",
            queries=(Query("sum by (worker) (vlcache_outstanding_tokens)", "{{worker}}"),),
        ),
        Panel(
            title="Answers that went on elsewhere",
            text="`resend`: a retained parcel was sent again. `reprefill`: the prompt was computed again."
            " `migration`: a worker leaves in good order.",
            unit=PER_S,
            queries=(Query(rate("vlcache_failovers_total", "kind"), "{{kind}}"),),
        ),
        heatmap("Failover", "vlcache_failover_seconds", "From the loss of a worker noticed to the next token."),
        Panel(
            title="Replayed tokens",
            text="Fed again after a failover, sent to nobody.",
            unit=PER_S,
            queries=(Query(rate("vlcache_replayed_tokens_total"), "replayed"),),
        ),
        Panel(
            title="Replaced preprocessing processes",
            text="`crash` and `timeout` are images that broke one.",
            unit=PER_S,
            queries=(Query(rate("vlcache_preprocess_replaced_total", "reason"), "{{reason}}"),),
        ),
    ),
)
