"""`image_affinity`: requests about one image go to one prefill worker, which may still have what it made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

from router.placement.base import Demand, Group, Pair
from router.placement.cheapest import cheapest_pairs, pairs_of
from router.placement.cost import prefill_cost, ranked
from router.worker import Worker

MAX_LOAD = 2.0


class ImageAffinity:
    """Rendezvous hashing over the prefill workers (Thaler and Ravishankar, 1998), with bounded loads.

    Every worker has a hash with every image, and the highest wins: no table, every router says the same, and a worker
    that leaves moves its own images only. A favourite that would take more than `MAX_LOAD` times the mean cost is
    passed over for the next one (after Mirrokni, Thorup and Zadimoghaddam, 2018), so a popular image cannot bury its
    worker. The decode worker is the cheapest one; requests without image go by cost alone.
    """

    def order(self, groups: Sequence[Group], demand: Demand) -> Iterator[Pair]:
        """Every ready pair of `groups` once, best first."""
        key = demand.image_key()
        if key is None:
            yield from cheapest_pairs(groups, demand)
            return
        for worker, group in _favourites_first(groups, demand, key):
            yield from pairs_of(worker, group.decode, demand)


def _favourites_first(groups: Sequence[Group], demand: Demand, key: int) -> list[tuple[Worker, Group]]:
    """Favourites in order, then those of them that are overloaded."""
    costs = [(cost, worker, group) for group in groups for cost, worker in ranked(group.prefill, prefill_cost, demand)]
    most = MAX_LOAD * sum(cost for cost, _, _ in costs) / max(1, len(costs))
    costs.sort(key=lambda entry: (entry[0] > most, -affinity(entry[1], key)))
    return [(worker, group) for _, worker, group in costs]


def affinity(worker: Worker, key: int) -> int:
    """How much `worker` is the one for the images with this hash; the same in every router."""
    return xxhash.xxh3_64_intdigest(worker.client.address.encode(), seed=key)
