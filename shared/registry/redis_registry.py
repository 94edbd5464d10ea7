"""The workers that publish themselves in Redis, as a router sees them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from shared.errors import UnavailableError
from shared.registry.entry import MAX_ENTRY_BYTES, read_address
from shared.registry.outage import Outage
from shared.registry.redis_client import RedisLocation, bounded

log = logging.getLogger(__name__)

# Many times what one router polls; more is not a list of workers.
MAX_ENTRIES = 10_000
SCAN_COUNT = 1_000
# Values read at once; those of more workers follow at the next look.
MAX_READS = 500


class RedisRegistry:
    """Reads `{prefix}worker:*`. Needs SCAN and GETRANGE (and SELECT for another database than 0).

    The value of a key is read once: a worker keeps its address as long as its epoch, and its load is asked of itself.
    SCAN walks the whole database, which therefore should be the registry's own.
    """

    def __init__(self, location: RedisLocation) -> None:
        self._pattern = f"{location.entries}*"
        self._redis = location.connect()
        self._outage = Outage(log)
        self._known: dict[bytes, str] = {}
        self._malformed: set[bytes] = set()

    async def addresses(self) -> Sequence[str]:
        """The addresses of all well-formed entries; those of the last answer while Redis is gone."""
        try:
            await bounded(self._read())
        except UnavailableError as error:
            self._outage.goes_on(error)
        else:
            self._outage.ends()
        return sorted(set(self._known.values()))

    async def close(self) -> None:
        """Closes the connection."""
        await self._redis.aclose()

    async def _read(self) -> None:
        keys = await self._keys()
        # malformed ones last: they may be many and must not keep a worker from being seen
        unread = sorted(keys - self._known.keys(), key=lambda key: (key in self._malformed, key))[:MAX_READS]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key in unread:
                # one byte too many tells that it is too long
                pipeline.getrange(key, 0, MAX_ENTRY_BYTES)
            values = await pipeline.execute(raise_on_error=False)
        self._malformed &= keys
        self._known = {key: address for key, address in self._known.items() if key in keys}
        for key, value in zip(unread, values, strict=True):
            self._take(key, value)

    async def _keys(self) -> set[bytes]:
        keys: set[bytes] = set()
        async for key in self._redis.scan_iter(self._pattern, count=SCAN_COUNT):
            keys.add(key)
            if len(keys) > MAX_ENTRIES:
                raise UnavailableError(f"Redis: more than {MAX_ENTRIES} keys like {self._pattern}", reason="REGISTRY")
        return keys

    def _take(self, key: bytes, value: bytes | Exception) -> None:
        if isinstance(value, Exception) and not str(value).startswith("WRONGTYPE"):
            raise value
        try:
            if value:
                # an empty one has expired since the key was seen
                self._known[key] = read_address(value if isinstance(value, bytes) else b"")
        except ValueError as error:
            if key not in self._malformed:
                log.warning("registry entry %r is skipped: %s", key[:120], error)
            self._malformed.add(key)


def open_registry(location: str) -> RedisRegistry:
    """Reads `redis://...` or `rediss://...`.

    Raises:
        ValueError: Something in it cannot be read.
    """
    return RedisRegistry(RedisLocation.parse(location))
