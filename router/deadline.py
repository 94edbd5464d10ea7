"""The one clock of a request: what its client still allows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from shared.errors import DeadlineExceededError

# gRPC rounds a timeout up to three digits on its way here.
ROUNDING_SHARE = 0.01
# We give up a little before the client does: a status that names the stage then still reaches it.
MARGIN_SHARE, MARGIN_MAX_S = 0.05, 0.05


@dataclass(frozen=True)
class Deadline:
    """A moment of the running loop's clock; `at_s` None means that there is none."""

    at_s: float | None

    @classmethod
    def after(cls, timeout_s: float | None) -> Deadline:
        """The deadline of a client that waits for `timeout_s` from now on."""
        if timeout_s is None:
            return cls(None)
        margin_s = timeout_s * ROUNDING_SHARE + min(timeout_s * MARGIN_SHARE, MARGIN_MAX_S)
        return cls(asyncio.get_running_loop().time() + timeout_s - margin_s)

    def remaining_s(self) -> float | None:
        """Seconds left, never negative; None without a deadline."""
        if self.at_s is None:
            return None
        return max(0.0, self.at_s - asyncio.get_running_loop().time())

    def at_most(self, timeout_s: float) -> float:
        """`timeout_s`, or less when the deadline comes first."""
        remaining_s = self.remaining_s()
        return timeout_s if remaining_s is None else min(timeout_s, remaining_s)

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self.remaining_s() == 0.0

    @staticmethod
    def error(stage: str) -> DeadlineExceededError:
        """What the client is told when the deadline passes in `stage`."""
        return DeadlineExceededError(f"the deadline passed in stage {stage!r}", stage=stage)
