"""Which addresses this process may be sent to by a stranger: none but those of the public internet."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

# Prefixes of IPv6 that stand for an IPv4 address, which may be any: NAT64.
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name.

    Raises:
        OSError: It has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(where[0]) for *_, where in found]


def is_public(address: str) -> bool:
    """Whether an address is anybody's; not those of this machine, of private networks, or of nobody."""
    # scopes are of links
    given = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(given, ipaddress.IPv6Address):
        if given in TRANSLATED or given.sixtofour or given.teredo:
            return False
        if given.ipv4_mapped:
            given = given.ipv4_mapped
    return given.is_global and not (given.is_multicast or given.is_reserved)
