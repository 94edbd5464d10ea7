"""`python -m deploy.grafana.picture`: a PNG of a dashboard, drawn by Grafana's own components from a Prometheus' data.

Needs node, npm and chromium, and takes Grafana's packages (400 MB) to build/ at the first run. Grafana publishes the
components of numbers and curves only: heatmaps and bars are left out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "dashboard-picture"
DASHBOARDS = HERE.parent / "dashboards"
DRAWABLE = ("stat", "timeseries")
INTERVAL = "20s"
TITLE_PX, ROW_PX, GAP_PX, WIDTH_PX, COLUMNS = 64, 34, 8, 1200, 24
# An instant query is drawn from its last point.
STEPS = 240
PAGE = (
    '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="page.css"><div id="root"></div>'
    '<script src="view.js"></script><script src="page.js"></script>'
)
LOADERS = [f"--loader:.{kind}=dataurl" for kind in ("svg", "woff2", "ttf", "woff", "png")]


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """Draw one dashboard."""

    out: Path
    """PNG file."""
    prometheus: str = "http://127.0.0.1:9090"
    """Where to ask."""
    board: str = "vlcache-memory"
    """Which dashboard."""
    seconds: int = 120
    """What is shown ends now and is so long."""


def main(config: PictureConfig) -> int:
    """Asks, draws, and returns the exit code."""
    view = collect(config)
    _install()
    _bundle()
    (BUILD / "view.js").write_text(f"window.VIEW = {json.dumps(view)}")
    (BUILD / "page.html").write_text(PAGE)
    _shoot(config.out.resolve(), _height(view["panels"]))
    return 0


def collect(config: PictureConfig) -> dict[str, Any]:
    """What the page shows: panels and the series of their queries."""
    end_s = time.time()
    start_s = end_s - config.seconds
    document = json.loads((DASHBOARDS / f"{config.board}.json").read_text())
    panels = []
    for panel in document["panels"]:
        if panel["type"] in DRAWABLE:
            series = [each for target in panel["targets"] for each in _ask(config, target, start_s, end_s)]
            panels.append({"panel": panel, "series": series})
    return {"title": document["title"], "width": WIDTH_PX, "panels": panels, "start_s": start_s, "end_s": end_s}


def _ask(config: PictureConfig, target: dict[str, Any], start_s: float, end_s: float) -> list[dict[str, Any]]:
    expr = target["expr"].replace("$__rate_interval", INTERVAL)
    parameters = {"query": expr, "start": start_s, "end": end_s, "step": config.seconds / STEPS}
    url = f"{config.prometheus}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 -- the operator's own Prometheus
        matrix = json.load(response)["data"]["result"]
    return [{"legend": _legend(target["legendFormat"], each["metric"]), "values": _points(each)} for each in matrix]


def _legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), template)


def _points(series: dict[str, Any]) -> list[tuple[float, float]]:
    # a share of nothing is no number, and JSON has no word for it
    return [(at, float(text)) for at, text in series["values"] if text != "NaN"]


def _install() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    if not (BUILD / "node_modules").exists():
        (BUILD / "package.json").write_bytes((HERE / "package.json").read_bytes())
        subprocess.run(["npm", "install", "--legacy-peer-deps", "--no-audit", "--no-fund"], cwd=BUILD, check=True)


def _bundle() -> None:
    modules = BUILD / "node_modules"
    command = [str(modules / ".bin" / "esbuild"), str(HERE / "page.tsx"), f"--outfile={BUILD / 'page.js'}", *LOADERS]
    # in development Grafana's components refuse to render before a server has sent translations
    options = ["--bundle", "--minify", "--jsx=automatic", '--define:process.env.NODE_ENV="production"']
    subprocess.run([*command, *options], env={**os.environ, "NODE_PATH": str(modules)}, check=True)


def _shoot(out: Path, height: int) -> None:
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=10000", "--log-level=3"]
    size = f"--window-size={WIDTH_PX + 2 * GAP_PX},{height}"
    subprocess.run(["chromium", *flags, size, f"--screenshot={out}", str(BUILD / "page.html")], check=True)


def _height(panels: list[dict[str, Any]]) -> int:
    rows, x = [0], COLUMNS
    for place in (panel["panel"]["gridPos"] for panel in panels):
        if x + place["w"] > COLUMNS:
            rows.append(place["h"] * ROW_PX + GAP_PX)
            x = 0
        x += place["w"]
    return TITLE_PX + sum(rows)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PictureConfig, description=__doc__)))
