"""What is compared."""

from __future__ import annotations

from dataclasses import dataclass

# The task of rows over all tasks.
ALL_TASKS = "all"


@dataclass(frozen=True)
class Setting:
    """A policy as it was written, and the kept share that was asked for."""

    policy: str
    retention: float


FULL = Setting("full", 1.0)
"""The full cache, which every other setting is compared with."""
