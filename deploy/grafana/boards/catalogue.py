"""All dashboards."""

from __future__ import annotations

from deploy.grafana.boards.latency import LATENCY
from deploy.grafana.boards.memory import MEMORY
from deploy.grafana.boards.pools import POOLS
from deploy.grafana.boards.quality import QUALITY
from deploy.grafana.boards.stages import STAGE_BOARD
from deploy.grafana.boards.wire import WIRE
from deploy.grafana.boards.workers import WORKERS

BOARDS = (MEMORY, WIRE, LATENCY, STAGE_BOARD, POOLS, WORKERS, QUALITY)
