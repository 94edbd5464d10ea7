"""Writes a dashboard down as Grafana reads it."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as dashboard_model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.panel import WIDTH, Board, Kind, Panel, Query

# Where the dashboards find Prometheus: a variable of each, so that they can be imported anywhere.
SOURCE = "datasource"
HEIGHT = {"stat": 5, "heatmap": 9, "lines": 8, "stack": 8, "bars": 8}


def to_json(board: Board) -> str:
    """A dashboard as JSON text."""
    built = dashboard.Dashboard(board.title).uid(board.uid).description(board.text).tags(["vlcache"])
    built.time("now-30m", "now").refresh("10s").timezone("browser").readonly()
    built.tooltip(dashboard_model.DashboardCursorSync.CROSSHAIR)
    built.with_variable(dashboard.DatasourceVariable(SOURCE).label("Prometheus").type("prometheus"))
    built.link(_to_the_others())
    for number, (panel, place) in enumerate(zip(board.panels, _places(board.panels), strict=True), start=1):
        built.with_panel(_panel(panel).id(number).grid_pos(place))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


def _places(panels: tuple[Panel, ...]) -> list[dashboard_model.GridPos]:
    """Rows from left to right; a row is as high as its first panel."""
    places, x, y, height = [], 0, 0, 0
    for panel in panels:
        if x == 0 or x + panel.width > WIDTH:
            x, y, height = 0, y + height, HEIGHT[panel.kind]
        places.append(dashboard_model.GridPos(x=x, y=y, w=panel.width, h=height))
        x += panel.width
    return places


def _panel(panel: Panel) -> Any:
    drawn = DRAWN[panel.kind]().title(panel.title).description(panel.text)
    drawn.datasource(_source())
    for letter, query in zip(ascii_uppercase, panel.queries, strict=False):
        drawn.with_target(_target(letter, query, panel.kind))
    if panel.kind == "heatmap":
        return drawn.y_axis(heatmap.YAxisConfig().unit(panel.unit))
    return drawn.unit(panel.unit)


def _target(letter: str, query: Query, kind: Kind) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.legend or "__auto")
    if kind in ("stat", "bars"):
        return target.instant()
    return target.range().format(PromQueryFormat.HEATMAP if kind == "heatmap" else PromQueryFormat.TIME_SERIES)


def _stat() -> Any:
    return stat.Panel().color_mode(common_model.BigValueColorMode.VALUE).reduce_options(_last())


def _lines() -> Any:
    legend = common.VizLegendOptions().show_legend(True).placement(common_model.LegendPlacement.BOTTOM)
    legend.display_mode(common_model.LegendDisplayMode.LIST)
    drawn = timeseries.Panel().legend(legend).line_width(2).fill_opacity(8).min(0)
    return drawn.tooltip(common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI))


def _stack() -> Any:
    return _lines().fill_opacity(40).stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))


def _bars() -> Any:
    drawn = bargauge.Panel().orientation(common_model.VizOrientation.HORIZONTAL).min(0).reduce_options(_last())
    return drawn.display_mode(common_model.BarGaugeDisplayMode.BASIC)


def _heatmap() -> Any:
    color = heatmap.HeatmapColorOptions().mode(heatmap_model.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return heatmap.Panel().color(color.exponent(0.5).fill("dark-orange")).calculate(False).hide_legend()


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _source() -> dashboard_model.DataSourceRef:
    return dashboard_model.DataSourceRef(type_val="prometheus", uid=f"${{{SOURCE}}}")


def _to_the_others() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("vlcache").type(dashboard_model.DashboardLinkType.DASHBOARDS).tags(["vlcache"])
    return link.as_dropdown(True).keep_time(True).include_vars(True)


DRAWN = {"stat": _stat, "lines": _lines, "stack": _stack, "bars": _bars, "heatmap": _heatmap}
