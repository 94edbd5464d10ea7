"""`image_affinity`: requests about one image go to one prefill worker, which may still have what it made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import xxhash

from router.placement.base import Demand, Group, Pair
from router.placement.cheapest import cheapest_pairs, pairs_of
from router.placement.cost import own_time, prefill_cost, ranked
from router.workers.worker import Worker

MAX_DETOUR = 0.5


class ImageAffinity:
    """Rendezvous hashing over the prefill workers (Thaler and Ravishankar, 1998), with a limit to their load.

    Every worker has a hash with every image, and the highest wins: no table, every router says the same, and a worker
    that leaves moves its own images only. A favourite is passed over for the next one when the prompt would be done
    there later than elsewhere by more than `MAX_DETOUR` of its own time, which is about what it can save; so a popular
    image spreads over as many workers as it needs. (Bounds by the mean load, as Mirrokni et al. have them in 2018, let
    unequal workers wait for more than there is to save.) The decode worker is the cheapest one; requests without image
    go by cost alone.
    """

    def __init__(self, chance: Random) -> None:
        """`chance` blurs the costs of requests without image."""
        self._chance = chance

    def order(self, groups: Sequence[Group], demand: Demand) -> Iterator[Pair]:
        """Every ready pair of `groups` once, best first."""
        key = demand.image_key()
        if key is None:
            yield from cheapest_pairs(groups, demand, self._chance)
            return
        for worker, group in _favourites_first(groups, demand, key):
            yield from pairs_of(worker, group.decode, demand)


def _favourites_first(groups: Sequence[Group], demand: Demand, key: int) -> list[tuple[Worker, Group]]:
    """Favourites in order, then those that would keep the request waiting."""
    costs = [(cost, worker, group) for group in groups for cost, worker in ranked(group.prefill, prefill_cost, demand)]
    least = min((cost for cost, _, _ in costs), default=0.0)
    costs.sort(key=lambda entry: (entry[0] > least + detour(entry[1], demand), -affinity(entry[1], key)))
    return [(worker, group) for _, worker, group in costs]


def detour(worker: Worker, demand: Demand) -> float:
    """Seconds that a request may lose for going to `worker`."""
    return MAX_DETOUR * own_time(worker, demand)


def affinity(worker: Worker, key: int) -> int:
    """How much `worker` is the one for the images with this hash; the same in every router."""
    return xxhash.xxh3_64_intdigest(worker.client.address.encode(), seed=key)
