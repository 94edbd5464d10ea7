"""What the router's policies are measured by: chance, and somebody who knows everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from random import Random

from benchmarks.placement.servers import DecodeServer, PrefillServer
from benchmarks.placement.trace import Request
from router.placement.base import Demand, Group, Pair
from router.workers.worker import Worker


class RandomPairs:
    """Any pair."""

    def __init__(self, chance: Random) -> None:
        self._chance = chance

    def order(self, groups: Sequence[Group], demand: Demand) -> Iterator[Pair]:
        """Every pair once, in a random order of either role."""
        for group in groups:
            prefill = self._chance.sample(group.prefill, len(group.prefill))
            decode = self._chance.sample(group.decode, len(group.decode))
            yield from (Pair(*members) for members in product(prefill, decode))


class Clairvoyant:
    """Knows every queue, speed, cache and pool as they are: the prompt goes where it would end first.

    No router can; it still decides one request at a time and does not know what comes, so it is the limit of those who
    decide so.
    """

    def __init__(self, request: Callable[[], Request], now_s: Callable[[], float]) -> None:
        """`request` is the one that is being placed."""
        self._request = request
        self._now_s = now_s
        self.servers: dict[Worker, PrefillServer | DecodeServer] = {}

    def order(self, groups: Sequence[Group], demand: Demand) -> Iterator[Pair]:
        """Every pair once, the earliest end first, the emptiest pool first."""
        for group in groups:
            prefill = sorted(group.prefill, key=self._end_s)
            decode = sorted(group.decode, key=self._fill)
            yield from (Pair(*members) for members in product(prefill, decode))

    def _end_s(self, worker: Worker) -> float:
        server = self.servers[worker]
        assert isinstance(server, PrefillServer)
        return max(self._now_s(), server.free_at_s) + server.service_s(self._request())

    def _fill(self, worker: Worker) -> float:
        server = self.servers[worker]
        assert isinstance(server, DecodeServer)
        return server.used_tokens / server.pool_tokens
