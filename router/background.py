"""Work that outlives the request it belongs to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Background:
    """Owner of tasks that a cancelled handler must not take with it: releases, clean-ups, stream readers."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Starts `work` and keeps hold of it until it ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def settle(self, timeout_s: float) -> None:
        """Waits until nothing runs any more; what is left after `timeout_s` is cancelled."""
        give_up_at = asyncio.get_running_loop().time() + timeout_s
        while self._tasks:
            left_s = give_up_at - asyncio.get_running_loop().time()
            if left_s <= 0:
                return await self._cancel()
            await asyncio.wait(set(self._tasks), timeout=left_s)
        return None

    async def _cancel(self) -> None:
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.debug("background work failed", exc_info=task.exception())
