"""What compression may have changed in the answers."""

from __future__ import annotations

from deploy.grafana.panel import HALF, PER_S, RATIO, Board, Panel, Query, heatmap, mean, number, rate

QUALITY = Board(
    uid="vlcache-quality",
    title="vlcache: quality",
    text="Attention kept, what the quality guard did, agreement with the full cache.",
    panels=(
        number(
            "Agreement with the full cache",
            "sum (vlcache_shadow_agreement_ratio_sum) / sum (vlcache_shadow_agreement_ratio_count)",
            "Mean share of equal tokens in the shadow sample (`--shadow-share`), since the start.",
            RATIO,
            HALF,
        ),
        number(
            "Attention kept",
            "sum (vlcache_kv_kept_attention_mass_ratio_sum) / sum (vlcache_kv_kept_attention_mass_ratio_count)",
            "Mean share of the post-vision attention that lies on kept tokens, since the start.",
            RATIO,
            HALF,
        ),
        heatmap(
            "Attention kept",
            "vlcache_kv_kept_attention_mass_ratio",
            "Of each prompt. A share that falls says that prompts have changed, not yet that answers have.",
            RATIO,
        ),
        Panel(
            title="Attention kept, mean",
            text="Over time.",
            unit=RATIO,
            queries=(Query(mean("vlcache_kv_kept_attention_mass_ratio"), "mean"),),
        ),
        Panel(
            title="Quality guard",
            text="`kept`: the choice was good enough. `grown`, `full`: more was kept. `refused`: more was wanted than"
            " there was room for.",
            unit=PER_S,
            kind="stack",
            queries=(Query(rate("vlcache_guard_total", "outcome"), "{{outcome}}"),),
        ),
        Panel(
            title="Fallbacks of the guard",
            text="Parcels per second that became larger than was asked for, or should have.",
            unit=PER_S,
            queries=(Query(rate("vlcache_guard_total", where='outcome!="kept"'), "fallbacks"),),
        ),
        heatmap(
            "Agreement with the full cache",
            "vlcache_shadow_agreement_ratio",
            "Share of equal tokens of each answer of the shadow sample.",
            RATIO,
        ),
        Panel(
            title="Shadow sample",
            text="`dropped` ones gave way to clients.",
            unit=PER_S,
            kind="stack",
            queries=(Query(rate("vlcache_shadow_requests_total", "outcome"), "{{outcome}}"),),
        ),
        heatmap(
            "Retention below what was asked for",
            "vlcache_retention_lowered_ratio",
            "Share that lowered reservations got.",
            RATIO,
        ),
    ),
)
