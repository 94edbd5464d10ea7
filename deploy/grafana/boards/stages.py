"""Where a request's time goes, stage by stage."""

from __future__ import annotations

from deploy.grafana.panel import FULL, SECONDS, Board, Panel, Query, heatmap, mean, quantile, rate

STAGES = (
    "admit",
    "preprocess",
    "vision_encode",
    "prefill",
    "statistics",
    "select",
    "transfer",
    "install",
    "decode_queue",
)
"""Those of every request with an image, in the order of its life."""
QUEUE = "vlcache_request_queue_time_seconds"


def _mean_of(stage: str) -> str:
    chosen = f'stage="{stage}"'
    total, count = (rate(f"vlcache_stage_seconds_{what}", where=chosen) for what in ("sum", "count"))
    return f"{total} / {count}"


def _waterfall() -> tuple[Query, ...]:
    queries = [Query(_mean_of(stage), stage) for stage in STAGES]
    # between preprocessing and the pass, which begins with the vision tower
    queries.insert(STAGES.index("vision_encode"), Query(mean(QUEUE), "wait for other prompts"))
    return tuple(queries)


STAGE_BOARD = Board(
    uid="vlcache-stages",
    title="vlcache: stages",
    text="Where a request's time goes before its second token.",
    panels=(
        Panel(
            title="A request's stages",
            text="Mean of each stage, in the order of a request's life. The first token leaves after `prefill`; what"
            " follows up to `decode_queue` lies between first and second token.",
            unit=SECONDS,
            kind="bars",
            width=FULL,
            queries=_waterfall(),
        ),
        Panel(
            title="Stages over time",
            text="Means on top of each other: the height is what a typical request needs before its second token.",
            unit=SECONDS,
            kind="stack",
            width=FULL,
            queries=_waterfall(),
        ),
        Panel(
            title="Stages, 99th percentile",
            text="Every stage that there was, those of single policies included.",
            unit=SECONDS,
            queries=(Query(quantile(0.99, "vlcache_stage_seconds", "stage"), "{{stage}}"),),
        ),
        heatmap("Wait for other prompts", QUEUE, "More prefill workers shorten it."),
    ),
)
