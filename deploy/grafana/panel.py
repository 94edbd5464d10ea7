"""What a dashboard shows, without how Grafana writes it down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["stat", "lines", "stack", "bars", "heatmap"]
"""A number, curves, curves on top of each other, one bar per query, a histogram over time."""

WIDTH = 24
"""Grafana's columns."""
THIRD, HALF, FULL = WIDTH // 3, WIDTH // 2, WIDTH

BYTES, BYTES_PER_S, SECONDS, RATIO, PER_S, COUNT = "bytes", "binBps", "s", "percentunit", "cps", "short"
"""Names of Grafana's units; a ratio is shown as per cent."""

INTERVAL = "[$__rate_interval]"
"""What Grafana replaces by a few scrape intervals."""


@dataclass(frozen=True)
class Query:
    """One PromQL expression and the name of each of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One rectangle of a dashboard."""

    title: str
    text: str
    """What it means and what to do about it."""
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = HALF


@dataclass(frozen=True, kw_only=True)
class Board:
    """One dashboard; `uid` is also the name of its file."""

    uid: str
    title: str
    text: str
    panels: tuple[Panel, ...]


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Growth of a counter per second, summed over processes but for the labels `by`."""
    grouping = f" by ({by})" if by else ""
    selector = f"{{{where}}}" if where else ""
    return f"sum{grouping} (rate({metric}{selector}{INTERVAL}))"


def mean(histogram: str, by: str = "") -> str:
    """Mean of what a histogram has seen."""
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """A quantile of what a histogram has seen."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', labels)})"


def heatmap(title: str, histogram: str, text: str, unit: str = SECONDS, width: int = HALF) -> Panel:
    """All buckets of a histogram over time."""
    query = Query(rate(f"{histogram}_bucket", "le"), "{{le}}")
    return Panel(title=title, text=text, unit=unit, kind="heatmap", width=width, queries=(query,))


def number(title: str, expr: str, text: str, unit: str, width: int = THIRD) -> Panel:
    """One number."""
    return Panel(title=title, text=text, unit=unit, kind="stat", width=width, queries=(Query(expr),))
