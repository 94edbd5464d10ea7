"""Where a router learns which workers exist, and where workers say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from shared.registry.entry import Entry


class Registry(Protocol):
    """Lists worker addresses; says nothing about their health, which the router asks the workers themselves.

    Called by the router's worker table, in its event loop, once per poll interval. An implementation that loses its
    source answers with the last list it knew: a registry that is down must not take the workers down with it.
    """

    async def addresses(self) -> Sequence[str]:
        """The `host:port` of every worker, each at most once, in a stable order."""
        ...

    async def close(self) -> None:
        """Gives connections back; nothing is asked afterwards."""
        ...


class Listing(Protocol):
    """The other side of a registry: where workers publish themselves.

    Called by `shared.registry.presence` in the worker's event loop, every few seconds. Every call is bounded in time.
    """

    async def publish(self, entries: Sequence[Entry]) -> None:
        """Writes or renews the entries; they vanish by themselves some beats after the last call.

        Raises:
            UnavailableError: The registry cannot be reached, or refuses.
        """
        ...

    async def withdraw(self, entries: Sequence[Entry]) -> None:
        """Removes the entries at once.

        Raises:
            UnavailableError: The registry cannot be reached, or refuses.
        """
        ...

    async def close(self) -> None:
        """Gives connections back; nothing is written afterwards."""
        ...
