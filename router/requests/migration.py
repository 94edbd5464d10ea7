"""Sequences of a decode worker that is leaving go on elsewhere before it has left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from router.background import Background
from router.requests.generation import Generation
from router.workers.table import WorkerTable
from shared.errors import ServiceError

log = logging.getLogger(__name__)

# How soon it is noticed that a worker drains.
LOOK_S = 0.1
# After a round in which somebody found no room: the sequences are fine where they are.
BACKOFF_S = 1.0
# Parcels that travel at the same time, so that those of new requests need not stand behind them.
AT_ONCE = 8


class Migration:
    """Goes in rounds over the requests whose decode worker is leaving; those that find no room stay for the next."""

    def __init__(self, table: WorkerTable, running: Callable[[], Iterable[Generation]], background: Background) -> None:
        """Prepares; `running` gives the requests in flight, which are asked only while some worker leaves."""
        self._table = table
        self._running = running
        self._background = background

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._table.anyone_leaves:
                continue
            leaving = [generation for generation in self._running() if generation.can_leave]
            if leaving and not await self._round(leaving):
                await asyncio.sleep(BACKOFF_S)

    async def _round(self, leaving: list[Generation]) -> bool:
        """Whether nobody was left without room; one that is ends the round: the others would hardly find any."""
        slots, no_room = asyncio.Semaphore(AT_ONCE), asyncio.Event()
        movers = [self._background.spawn(self._move(generation, slots, no_room)) for generation in leaving]
        await asyncio.gather(*movers, return_exceptions=True)
        return not no_room.is_set()

    async def _move(self, generation: Generation, slots: asyncio.Semaphore, no_room: asyncio.Event) -> None:
        async with slots:
            # it may have ended, or been lost, since the round began
            if generation.can_leave and not no_room.is_set() and not await self._leaves(generation):
                no_room.set()

    async def _leaves(self, generation: Generation) -> bool:
        try:
            return await generation.leave()
        except ServiceError as error:
            log.info("request %s stays at its leaving worker: %s", generation.request.request_id, error.message)
            return False
