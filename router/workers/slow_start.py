"""How much a worker gets that has just come, or come back."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_SHARE = 0.1


class SlowStart:
    """One for all workers of a router.

    An empty newcomer looks better than everybody else and would get every request until its first report; its caches
    and its clocks are cold as well. So its share grows over `seconds`, from a tenth to all of it. Workers that are seen
    in the router's own first `seconds` are spared: who has just come himself cannot tell who is new.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """0 seconds: everybody gets a full share at once."""
        self._seconds = seconds
        self._clock = clock
        self._born_s = clock()

    def share(self, since_s: float) -> float:
        """Of a worker that takes requests since `since_s`, in [0.1, 1]."""
        age_s = self._clock() - since_s
        if age_s >= self._seconds or since_s - self._born_s < self._seconds:
            return 1.0
        return max(LEAST_SHARE, age_s / self._seconds)
