"""`power_of_two`: two workers at random, the better one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from random import Random

from router.placement.base import Demand, Group, Pair
from router.placement.cheapest import cheapest_pairs
from router.placement.cost import IN_MEMORY_S, decode_cost, prefill_cost
from router.workers.worker import Worker

CHOICES = 2
# Draws that may meet a worker that is not ready or has just come, before everybody is looked at.
MAX_DRAWS = 8


class PowerOfTwo:
    """Two random workers of each role, the cheapest of their four pairs (Mitzenmacher, 2001).

    One choice more takes the longest queue from log n / log log n to log log n, and the time does not grow with the
    number of workers. Routers that share old reports do not all run to the same empty worker, as they do when they
    look at everybody. What follows when a decode worker refuses is `least_loaded`'s order.
    """

    def __init__(self, chance: Random) -> None:
        """`chance` draws."""
        self._chance = chance

    def order(self, groups: Sequence[Group], demand: Demand) -> Iterator[Pair]:
        """Every ready pair of `groups` once, best first."""
        first = self._first(groups, demand)
        if first is not None:
            yield first
        yield from (pair for pair in cheapest_pairs(groups, demand, self._chance) if pair != first)

    def _first(self, groups: Sequence[Group], demand: Demand) -> Pair | None:
        if not groups:
            return None
        [group] = self._chance.choices(groups, weights=[len(group.prefill) for group in groups])
        prefill, decode = self._drawn(group.prefill), self._drawn(group.decode)
        pairs = [Pair(*members) for members in product(prefill, decode)]
        return min(pairs, key=lambda pair: _cost(pair, demand), default=None)

    def _drawn(self, workers: Sequence[Worker]) -> list[Worker]:
        """Ready ones; a worker that has just come is taken with its share for probability."""
        found: list[Worker] = []
        for _ in range(MAX_DRAWS):
            worker = self._chance.choice(workers)
            if worker.ready and self._chance.random() < worker.share:
                found.append(worker)
                if len(found) == CHOICES:
                    break
        return found


def _cost(pair: Pair, demand: Demand) -> float:
    cost = prefill_cost(pair.prefill, demand) + decode_cost(pair.decode, demand)
    return cost - IN_MEMORY_S if pair.in_memory else cost
