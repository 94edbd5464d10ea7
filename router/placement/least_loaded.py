"""`least_loaded`: the pair on which the request costs least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from router.placement.base import Demand, Group, Pair
from router.placement.cheapest import cheapest_pairs


class LeastLoaded:
    """Looks at every worker, scores pairs together; equals take turns.

    cost = seconds until the prompt is done + share of the decode pool that is taken - worth of a hand-over in memory

    Load is counted at dispatch (`Worker.charge`), so a burst that arrives between two polls spreads out; what other
    routers send is known from polls alone, and the cost is blurred accordingly (`noisy_prefill_cost`).
    """

    def __init__(self, chance: Random) -> None:
        """`chance` blurs."""
        self._chance = chance

    def order(self, groups: Sequence[Group], demand: Demand) -> Iterator[Pair]:
        """Every ready pair of `groups` once, best first."""
        return cheapest_pairs(groups, demand, self._chance)
