"""Where a worker is reached: `host:port`, and nothing that gRPC would read as something else."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")


def split_address(address: str, *, lowest_port: int = 1) -> tuple[str, int]:
    """Host and port of `address`; an IPv6 host keeps its brackets.

    Raises:
        ValueError: It is not `host:port`, or the port lies outside `lowest_port` to 65535.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not lowest_port <= int(match[2]) <= 65535:
        raise ValueError(f"a worker's address is host:port, not {address[:80]!r}")
    return match[1], int(match[2])
