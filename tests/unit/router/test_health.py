"""Health follows the worker table, but not at every word that a worker says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from router.health import LEAST_INTERVAL_S, follow_workers
from tests.unit.router.fakes import Log, run


class Table:
    """One that says how often it was looked at."""

    def __init__(self) -> None:
        self.served: dict[str, Any] = {}
        self.looks = 0
        self._change = asyncio.Event()

    def next_change(self) -> asyncio.Event:
        return self._change

    def notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def workers(self) -> list[Any]:
        self.looks += 1
        return []

    def served_models(self) -> dict[str, Any]:
        return self.served


class Gauges:
    """Of no interest here."""

    def show_workers(self, workers: Any) -> None:
        """See `Accounting`."""

    def show_served(self, models: int) -> None:
        """See `Accounting`."""


@contextlib.asynccontextmanager
async def following() -> AsyncIterator[tuple[Table, Log]]:
    """A table that is followed, and what health was set to."""
    table, shown = Table(), Log()

    async def set_ready(ready: bool) -> None:
        shown.append(ready)

    task = asyncio.create_task(follow_workers(table, Gauges(), set_ready))  # type: ignore[arg-type]
    try:
        await shown.reaches(1)
        yield table, shown
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_change_after_a_quiet_time_shows_at_once() -> None:
    async def main() -> None:
        async with following() as (table, shown):
            await asyncio.sleep(1.5 * LEAST_INTERVAL_S)
            table.served["toy"] = object()
            table.notify()
            # two turns of the loop: one that wakes the follower, one in which it shows
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert shown == [False, True]

    run(main)


def test_many_changes_are_looked_at_ten_times_a_second_and_the_last_one_shows() -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        async with following() as (table, shown):
            began_s = clock()
            while (passed_s := clock() - began_s) < 5.5 * LEAST_INTERVAL_S:
                table.notify()
                await asyncio.sleep(0.001)
            assert 2 <= table.looks <= 1 + passed_s / LEAST_INTERVAL_S
            table.served["toy"] = object()
            table.notify()
            while not shown[-1]:
                await shown.reaches(len(shown) + 1)
            quiet = table.looks
            await asyncio.sleep(2 * LEAST_INTERVAL_S)
            assert table.looks == quiet

    run(main)
