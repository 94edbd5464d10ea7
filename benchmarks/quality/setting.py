"""What is compared."""

from __future__ import annotations

from dataclasses import dataclass

# The task of rows over all tasks.
ALL_TASKS = "all"


@dataclass(frozen=True)
class Setting:
    """A policy as it was written, the kept share that was asked for, and the limit of the quality guard, 1 for none."""

    policy: str
    retention: float
    max_dropped_attention: float = 1.0

    @property
    def label(self) -> str:
        """The policy with its guard, where it has one."""
        limit = self.max_dropped_attention
        return self.policy if limit == 1 else f"{self.policy}, guard {limit:g}"


FULL = Setting("full", 1.0)
"""The full cache, which every other setting is compared with."""
