"""Deadline and backoff of one call over all its attempts; knows no transport."""

import random
import time

from vlcache._errors import AlreadyExists, VlcacheError
from vlcache._settings import RetryPolicy


class Attempts:
    """The clock of one call. It starts with the first attempt.

    Whoever sends calls `begin` before each attempt and `backoff_s` after a failed one.
    """

    def __init__(self, *, policy: RetryPolicy, total_s: float) -> None:
        self._policy = policy
        self._total_s = total_s
        self._count = 0
        self._started_at = 0.0
        self._longest_s = policy.initial_backoff_s

    def begin(self) -> float:
        """Counts an attempt; returns the seconds it may take."""
        if self._count == 0:
            self._started_at = time.monotonic()
        self._count += 1
        return max(0.0, self._total_s - self.elapsed_s())

    def elapsed_s(self) -> float:
        """Seconds since the first attempt was sent."""
        return time.monotonic() - self._started_at

    def backoff_s(self, error: VlcacheError, *, within_s: float) -> float | None:
        """Seconds to wait before the next attempt; None when there is to be none.

        within_s: the wait must end this many seconds after the first attempt was sent, or it is of no use.
        """
        if self._count >= self._policy.max_attempts or not self._may_pass(error):
            return None
        delay_s = max(self._next_delay_s(), error.retry_after_s or 0.0)
        return delay_s if self.elapsed_s() + delay_s < within_s else None

    def _may_pass(self, error: VlcacheError) -> bool:
        # An id that is in flight during a retry is our own: the service is still cleaning the last attempt up.
        return error.retryable or (self._count > 1 and isinstance(error, AlreadyExists))

    def _next_delay_s(self) -> float:
        longest_s = self._longest_s
        self._longest_s = min(longest_s * self._policy.multiplier, self._policy.max_backoff_s)
        # Spreads clients over time; nothing secret depends on it.
        return longest_s * (1 - self._policy.jitter * random.random())  # noqa: S311
