"""Where a router learns which workers exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Registry(Protocol):
    """Lists worker addresses; says nothing about their health, which the router asks the workers themselves.

    Called by the router's worker table, in its event loop, once per poll interval. An implementation that loses its
    source answers with the last list it knew: a registry that is down must not take the workers down with it.
    """

    async def addresses(self) -> Sequence[str]:
        """The `host:port` of every worker, each at most once, in a stable order."""
        ...
