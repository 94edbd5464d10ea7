"""What grpc.health.v1 and the state gauges say: whatever the worker table says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from router.accounting import Accounting
from router.workers.table import WorkerTable


async def follow_workers(
    table: WorkerTable, accounting: Accounting, set_ready: Callable[[bool], Awaitable[None]]
) -> None:
    """Until cancelled: SERVING while at least one compatible pair is ready."""
    while True:
        change = table.next_change()
        accounting.show_workers(table.workers())
        await set_ready(bool(table.served_models()))
        await change.wait()
