"""Pairs by ascending cost, one by one, without ever listing all of them."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from router.placement.base import Demand, Group, Pair
from router.placement.cost import IN_MEMORY_S, decode_cost, noisy_prefill_cost, ranked
from router.workers.worker import Worker

Ranked = Sequence[tuple[float, Worker]]


class _Grid(NamedTuple):
    """Rows (prefill) and columns (decode), both ascending: costs grow along either."""

    prefill: Ranked
    decode: Ranked
    in_memory: bool

    def cost(self, row: int, column: int) -> float:
        return self.prefill[row][0] + self.decode[column][0] - (IN_MEMORY_S if self.in_memory else 0.0)


def cheapest_pairs(groups: Iterable[Group], demand: Demand, chance: Random) -> Iterator[Pair]:
    """Every ready pair once, by the sum of its members' costs, less if they hand over in memory.

    With p and d workers the first pair takes O(p log p + d log d), each further one O(log of those given).
    """
    grids = [grid for group in groups for grid in _grids(group, demand, chance)]
    for grid, row, column in _ascending(grids):
        pair = Pair(grid.prefill[row][1], grid.decode[column][1])
        # neighbours have a grid of their own, and came earlier there
        if pair.in_memory == grid.in_memory:
            yield pair


def pairs_of(prefill: Worker, decode: Iterable[Worker], demand: Demand) -> Iterator[Pair]:
    """A prefill worker that is settled, ready or not, with each ready decode worker, cheapest first."""
    pairs = [(cost, Pair(prefill, worker)) for cost, worker in ranked(decode, decode_cost, demand)]
    pairs.sort(key=lambda entry: entry[0] - IN_MEMORY_S * entry[1].in_memory)
    return (pair for _, pair in pairs)


def _grids(group: Group, demand: Demand, chance: Random) -> Iterator[_Grid]:
    """All against all, and each neighbourhood by itself."""
    prefill = ranked(group.prefill, noisy_prefill_cost(group.prefill, chance), demand)
    decode = ranked(group.decode, decode_cost, demand)
    if prefill and decode:
        yield _Grid(prefill, decode, in_memory=False)
    shared = {worker.neighbourhood for _, worker in prefill} & {worker.neighbourhood for _, worker in decode}
    rows, columns = _by_neighbourhood(prefill, shared), _by_neighbourhood(decode, shared)
    for name, row in rows.items():
        yield _Grid(row, columns[name], in_memory=True)


def _by_neighbourhood(workers: Ranked, wanted: Collection[str]) -> dict[str, list[tuple[float, Worker]]]:
    found = defaultdict(list)
    for entry in workers:
        if entry[1].neighbourhood in wanted:
            found[entry[1].neighbourhood].append(entry)
    return found


def _ascending(grids: Sequence[_Grid]) -> Iterator[tuple[_Grid, int, int]]:
    """Cells of all grids by cost: a cell enters the heap when the one before it in its row, or column 0, has left."""
    heap = [(grid.cost(0, 0), number, 0, 0) for number, grid in enumerate(grids)]
    heapq.heapify(heap)
    while heap:
        _, number, row, column = heapq.heappop(heap)
        grid = grids[number]
        yield grid, row, column
        if column + 1 < len(grid.decode):
            heapq.heappush(heap, (grid.cost(row, column + 1), number, row, column + 1))
        if column == 0 and row + 1 < len(grid.prefill):
            heapq.heappush(heap, (grid.cost(row + 1, 0), number, row + 1, 0))
