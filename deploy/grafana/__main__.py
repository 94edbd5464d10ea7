"""`python -m deploy.grafana`: writes the dashboards that Grafana is provisioned with."""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.grafana.boards.catalogue import BOARDS
from deploy.grafana.draw import to_json

FOLDER = Path(__file__).with_name("dashboards")


def main() -> int:
    """Writes every dashboard; returns the exit code."""
    FOLDER.mkdir(exist_ok=True)
    for board in BOARDS:
        (FOLDER / f"{board.uid}.json").write_text(to_json(board))
    return 0


if __name__ == "__main__":
    sys.exit(main())
