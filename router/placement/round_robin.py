"""`round_robin`: everybody in turn, whatever they have to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from random import Random

from router.placement.base import Demand, Group, Pair
from router.workers.worker import Worker


class RoundRobin:
    """The prefill worker and the decode worker that were sent nothing for longest.

    Blind to load, speed and memory: right where workers and requests are all alike, and the yardstick elsewhere. A
    group gets the turns of the worker of it that has waited longest.
    """

    def __init__(self, chance: Random) -> None:
        """Nothing is left to `chance` here."""

    def order(self, groups: Sequence[Group], demand: Demand) -> Iterator[Pair]:
        """Every ready pair of `groups` once, best first."""
        for group in sorted(groups, key=lambda group: min(worker.last_dispatch for worker in group.prefill)):
            decode = _in_turn(group.decode)
            yield from (Pair(*members) for members in product(_in_turn(group.prefill), decode))


def _in_turn(workers: Sequence[Worker]) -> list[Worker]:
    return sorted((worker for worker in workers if worker.ready), key=lambda worker: worker.last_dispatch)
