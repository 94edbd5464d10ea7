"""Where a worker publishes itself: one key with an expiry in Redis."""

from __future__ import annotations

from collections.abc import Sequence

from shared.registry.entry import Entry
from shared.registry.redis_client import RedisLocation, bounded

# Three beats: one may be late and one lost.
EXPIRY_S = 10


class RedisListing:
    """Writes `{prefix}worker:{role}:{epoch}`. Needs SET and DEL (and SELECT for another database than 0)."""

    def __init__(self, location: RedisLocation) -> None:
        self._prefix = location.entries
        self._redis = location.connect()

    async def publish(self, entries: Sequence[Entry]) -> None:
        """Sets every entry's key for `EXPIRY_S`.

        Raises:
            UnavailableError: Redis is gone or refuses.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for entry in entries:
            pipeline.set(self._key(entry), entry.to_json(), ex=EXPIRY_S)
        await bounded(pipeline.execute())

    async def withdraw(self, entries: Sequence[Entry]) -> None:
        """Deletes every entry's key.

        Raises:
            UnavailableError: Redis is gone or refuses; the keys expire.
        """
        await bounded(self._delete([self._key(entry) for entry in entries]))

    async def close(self) -> None:
        """Closes the connection."""
        await self._redis.aclose()

    async def _delete(self, keys: Sequence[str]) -> None:
        await self._redis.delete(*keys)

    def _key(self, entry: Entry) -> str:
        return self._prefix + entry.name


def open_listing(location: str) -> RedisListing:
    """Reads `redis://...` or `rediss://...`.

    Raises:
        ValueError: Something in it cannot be read.
    """
    return RedisListing(RedisLocation.parse(location))
