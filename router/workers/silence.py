"""Decode workers that hang: their token streams are given up."""

from __future__ import annotations

import asyncio
import logging

from router.workers.table import WorkerTable
from router.workers.worker import UNREACHABLE

log = logging.getLogger(__name__)

LOOKS_PER_TIMEOUT = 10


async def break_silence(table: WorkerTable, token_timeout_s: float) -> None:
    """Until cancelled: breaks the stream of a worker that owes tokens, says none for so long, and fails its polls.

    Silence alone is no sign: all our sequences may be parked while those of other routers go on. Nor is a failed poll
    alone, while tokens come. Whoever is attached to a broken stream hears `DECODE_WORKER_LOST` and goes on elsewhere.
    """
    while True:
        await asyncio.sleep(token_timeout_s / LOOKS_PER_TIMEOUT)
        for worker in list(table.workers()):
            if worker.state == UNREACHABLE and worker.tokens.silent_s > token_timeout_s:
                log.warning("%s hangs: its streams are given up", worker.info.name)
                await worker.tokens.close()
