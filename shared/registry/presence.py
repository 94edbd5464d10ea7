"""Keeps a process listed in a registry while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence

from shared.errors import UnavailableError
from shared.registry.entry import Entry
from shared.registry.location import open_listing
from shared.registry.outage import Outage
from shared.registry.registry import Listing

log = logging.getLogger(__name__)

BEAT_S, JITTER = 3.0, 0.2
FIRST_RETRY_S, MAX_RETRY_S = 0.5, 4.0

_random = secrets.SystemRandom()


class Presence:
    """Publishes what `entries` returns, again and again, in a task of its own. Serving never waits for it.

    Args:
        entries: What is true now; called on the event loop before every beat.
    """

    def __init__(self, listing: Listing, entries: Callable[[], Sequence[Entry]]) -> None:
        self._listing = listing
        self._entries = entries
        self._outage = Outage(log)
        self._retry_s = FIRST_RETRY_S
        self._wake = asyncio.Event()
        self._leaving = False

    async def run(self) -> None:
        """Beats until `leave`, then withdraws. Goes on when the registry is gone, and is back soon after it is."""
        while not self._leaving:
            self._wake.clear()
            delay_s = await self._beat()
            # asyncio.TimeoutError is not the built-in one before Python 3.11
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), delay_s * _random.uniform(1 - JITTER, 1 + JITTER))
        with contextlib.suppress(UnavailableError):
            await self._listing.withdraw(self._entries())

    def renew(self) -> None:
        """Beats at once, for something that others should know now."""
        self._wake.set()

    def leave(self) -> None:
        """Ends `run`."""
        self._leaving = True
        self._wake.set()

    async def _beat(self) -> float:
        """Publishes once; returns the seconds until the next time."""
        try:
            await self._listing.publish(self._entries())
        except UnavailableError as error:
            self._outage.goes_on(error)
            delay_s, self._retry_s = self._retry_s, min(2 * self._retry_s, MAX_RETRY_S)
            return delay_s
        self._outage.ends()
        self._retry_s = FIRST_RETRY_S
        return BEAT_S


@contextlib.asynccontextmanager
async def listed(location: str, entries: Callable[[], Sequence[Entry]]) -> AsyncIterator[Callable[[], None]]:
    """Keeps `entries` in the registry at `location` while open; yields what to call after a change.

    An empty location stands for no registry: then nothing happens.
    """
    if not location:
        yield lambda: None
        return
    listing = open_listing(location)
    presence = Presence(listing, entries)
    running = asyncio.create_task(presence.run())
    try:
        yield presence.renew
    finally:
        presence.leave()
        await running
        await listing.close()
