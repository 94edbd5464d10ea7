"""What grpc.health.v1 and the state gauges say: whatever the worker table says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from router.accounting import Accounting
from router.workers.table import WorkerTable

# From one look at all workers to the next: every answer to a poll changes the table, and there may be hundreds.
LEAST_INTERVAL_S = 0.1


async def follow_workers(
    table: WorkerTable, accounting: Accounting, set_ready: Callable[[bool], Awaitable[None]]
) -> None:
    """Until cancelled: SERVING while at least one compatible pair is ready.

    A change after a quiet time shows at once, any other one after `LEAST_INTERVAL_S`.
    """
    while True:
        change = table.next_change()
        accounting.show_workers(table.workers())
        served = table.served_models()
        accounting.show_served(len(served))
        await set_ready(bool(served))
        await asyncio.sleep(LEAST_INTERVAL_S)
        await change.wait()
