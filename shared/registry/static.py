"""A fixed list of workers: the registry of a single machine, and of a cluster whose names never change."""

from __future__ import annotations

from collections.abc import Sequence


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
            _check(address)
        if len(set(addresses)) < len(addresses):
            raise ValueError("a static registry names every worker once")
        self._addresses = tuple(addresses)

    @classmethod
    def parse(cls, location: str) -> StaticRegistry:
        """Reads what stands behind `static://`."""
        return cls([address.strip() for address in location.split(",") if address.strip()])

    async def addresses(self) -> Sequence[str]:
        """The list as it was given."""
        return self._addresses


def _check(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"a worker's address is host:port, not {address!r}")
