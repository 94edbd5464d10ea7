"""A fixed list of workers: the registry of a single machine, and of a cluster whose names never change."""

from __future__ import annotations

from collections.abc import Sequence

from shared.registry.address import split_address


class StaticRegistry:
    """The addresses of `static://host:port,host:port`."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Keeps `addresses`.

        Raises:
            ValueError: There is none, one appears twice, or one is not `host:port`.
        """
        if not addresses:
            raise ValueError("a static registry names at least one worker: static://host:port,host:port")
        for address in addresses:
            split_address(address)
        if len(set(addresses)) < len(addresses):
            raise ValueError("a static registry names every worker once")
        self._addresses = tuple(addresses)

    async def addresses(self) -> Sequence[str]:
        """The list as it was given."""
        return self._addresses

    async def close(self) -> None:
        """There is nothing to give back."""


def open_registry(location: str) -> StaticRegistry:
    """Reads `static://host:port,host:port`.

    Raises:
        ValueError: The list is not one of a static registry.
    """
    listed = location.removeprefix("static://").split(",")
    return StaticRegistry([address.strip() for address in listed if address.strip()])
