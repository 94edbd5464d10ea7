"""What a log says of a time without the registry: that it began and that it is over."""

from __future__ import annotations

import logging

from shared.errors import UnavailableError


class Outage:
    """Told the result of every call, it logs only the first failure and the first success after it."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._calls_failed = 0

    def goes_on(self, error: UnavailableError) -> None:
        """Another call failed."""
        if not self._calls_failed:
            self._log.warning("the registry cannot be used, everything goes on without it: %s", error.message)
        self._calls_failed += 1

    def ends(self) -> None:
        """A call succeeded."""
        if self._calls_failed:
            self._log.info("the registry can be used again after %d failed calls", self._calls_failed)
        self._calls_failed = 0
