"""What clients wait for."""

from __future__ import annotations

from deploy.grafana.panel import COUNT, PER_S, SECONDS, Board, Panel, Query, heatmap, quantile, rate

TTFT, TTST = "vlcache_time_to_first_token_seconds", "vlcache_time_to_second_token_seconds"
ITL, E2E = "vlcache_inter_token_latency_seconds", "vlcache_e2e_request_latency_seconds"


def _percentiles(histogram: str) -> tuple[Query, ...]:
    return tuple(Query(quantile(share, histogram), f"p{share * 100:g}") for share in (0.5, 0.9, 0.99))


LATENCY = Board(
    uid="vlcache-latency",
    title="vlcache: latency",
    text="As the router sees it: from a request received to its tokens sent.",
    panels=(
        heatmap("Time to first token", TTFT, "Queue, preprocessing, vision tower and prefill."),
        heatmap("Time to second token", TTST, "What follows the first one shows the hand-off to the decode worker."),
        heatmap("Between tokens", ITL, "Steps of the decode workers, and what disturbs them."),
        heatmap("Whole answers", E2E, "From a request received to its last token."),
        Panel(
            title="First token, percentiles",
            text="Compare with the second token's: both rise where prompts wait, only that one where transfers do.",
            unit=SECONDS,
            queries=_percentiles(TTFT),
        ),
        Panel(
            title="Second token, percentiles",
            text="First token, transfer, install, first step.",
            unit=SECONDS,
            queries=_percentiles(TTST),
        ),
        Panel(
            title="Between tokens, percentiles",
            text="Grows with the batch; jumps are preemptions or failovers.",
            unit=SECONDS,
            queries=_percentiles(ITL),
        ),
        Panel(
            title="Time per output token, percentiles",
            text="(E2E - TTFT) / (tokens - 1) of each request.",
            unit=SECONDS,
            queries=_percentiles("vlcache_request_time_per_output_token_seconds"),
        ),
        Panel(
            title="Requests ended",
            text="`refused` and `failed` should be 0; codes are in `vlcache_requests_total`.",
            unit=PER_S,
            kind="stack",
            queries=(Query(rate("vlcache_requests_total", "outcome"), "{{outcome}}"),),
        ),
        Panel(
            title="Requests in the router",
            text="Those that wait have no decode memory yet.",
            unit=COUNT,
            queries=(
                Query('sum (vlcache_num_requests_running{role="router"})', "in flight"),
                Query('sum (vlcache_num_requests_waiting{role="router"})', "waiting"),
            ),
        ),
        Panel(
            title="Tokens",
            text="Prompt tokens, visual and text, and generated ones.",
            unit=PER_S,
            queries=(
                Query(rate("vlcache_prompt_tokens_total"), "prompt"),
                Query(rate("vlcache_generation_tokens_total"), "generated"),
            ),
        ),
        Panel(
            title="Cancelled by clients, by stage",
            text="Clients that leave in stage `queue` did not want to wait.",
            unit=PER_S,
            queries=(Query(rate("vlcache_cancellations_total", "stage"), "{{stage}}"),),
        ),
    ),
)
