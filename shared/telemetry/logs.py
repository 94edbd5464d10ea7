"""Logging to stderr, one line per event."""

from __future__ import annotations

import logging
import sys


def configure_logging(name: str, level: str = "INFO") -> None:
    """Sends the log of this process to stderr, each line naming the process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
