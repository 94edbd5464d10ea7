"""Who goes next: urgent requests before others, tenants in turn, nobody left behind for ever."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Entry = TypeVar("Entry")

# A step of priority is worth so much waiting.
AGEING_S = 10.0
# Entries of the heap that are out of date are dropped when there are more of them than lanes, and so many.
MAX_STALE = 64


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Requests of equal rank stand in one lane."""

    tenant: str
    priority: int = 0
    """Less goes first."""
    begun: bool = False
    """The answer has begun and lost its worker: it goes before all that have not."""


class Lanes(Generic[Entry]):
    """A lane per rank, first come first served; among the lanes the one with the earliest due time.

        due time = when the lane began to wait for its turn + priority x AGEING_S

    A lane begins to wait when its first entry comes, and again whenever one of its entries was served: so lanes of
    equal priority take turns, however long they are. All wait alike, so their order never changes by itself, and what
    is not urgent goes before whatever urgent comes so much later: a lane whose priority is p steps behind is served at
    least once in p x AGEING_S seconds.

    Every operation takes O(log lanes). Invariant (`check_integrity`): a lane is never empty, and the heap holds it
    with its present due time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Empty; `clock` gives seconds and never goes back."""
        self._clock = clock
        self._ordinals = itertools.count()
        self._lanes: dict[Rank, _Lane[Entry]] = {}
        self._heap: list[tuple[_Due, _Lane[Entry]]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def first(self) -> Entry | None:
        """Whose turn it is; None when nobody is there."""
        lane = self._first_lane()
        return None if lane is None else next(iter(lane.entries))

    def would_be_first(self, rank: Rank) -> bool:
        """Whether it would be the turn of whoever came now."""
        lane = self._first_lane()
        return lane is None or (rank not in self._lanes and self._due(rank) < lane.due)

    def add(self, rank: Rank, entry: Entry) -> None:
        """`entry` comes."""
        lane = self._lanes.get(rank)
        if lane is None:
            lane = self._lanes[rank] = _Lane(self._due(rank))
            self._push(lane)
        lane.entries[entry] = None
        self._size += 1

    def remove(self, rank: Rank, entry: Entry, *, served: bool) -> None:
        """`entry` leaves; the turn of its lane is over when it was served."""
        lane = self._lanes[rank]
        del lane.entries[entry]
        self._size -= 1
        if not lane.entries:
            del self._lanes[rank]
            self._drop_stale()
        elif served:
            lane.due = self._due(rank)
            self._push(lane)

    def check_integrity(self) -> None:
        """Asserts the invariant, and that the size is the sum of the lanes'."""
        assert self._size == sum(len(lane.entries) for lane in self._lanes.values())
        assert all(lane.entries for lane in self._lanes.values()), "an empty lane"
        current = {id(lane) for due, lane in self._heap if lane.due == due}
        assert all(id(lane) in current for lane in self._lanes.values()), "a lane that would never be served"
        assert len(self._heap) <= 2 * len(self._lanes) + MAX_STALE, "what is out of date piles up"

    def _due(self, rank: Rank) -> _Due:
        return not rank.begun, self._clock() + rank.priority * AGEING_S, next(self._ordinals)

    def _first_lane(self) -> _Lane[Entry] | None:
        while self._heap:
            due, lane = self._heap[0]
            if lane.entries and lane.due == due:
                return lane
            heapq.heappop(self._heap)
        return None

    def _push(self, lane: _Lane[Entry]) -> None:
        heapq.heappush(self._heap, (lane.due, lane))
        self._drop_stale()

    def _drop_stale(self) -> None:
        if len(self._heap) > 2 * len(self._lanes) + MAX_STALE:
            self._heap = [(lane.due, lane) for lane in self._lanes.values()]
            heapq.heapify(self._heap)


# Not begun; seconds; ordinal, so that no two are equal.
_Due = tuple[bool, float, int]


@dataclass(eq=False)
class _Lane(Generic[Entry]):
    due: _Due
    entries: OrderedDict[Entry, None] = field(default_factory=OrderedDict)
