"""Work for a client that goes on only while the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive

from shared.errors import UnavailableError


class Attended:
    """Owner of the work that is done for clients at present."""

    def __init__(self) -> None:
        self._working: set[asyncio.Task[None]] = set()

    async def run(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Does `work` and ends it at once when the client leaves.

        Args:
            receive: Of the request, whose body was read.

        Raises:
            UnavailableError: `stop` has ended it.
        """
        working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
        self._working.add(working)
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.cancelled():
                raise UnavailableError("this router has stopped", reason="DRAINING")
            if working.done():
                working.result()
        finally:
            self._working.discard(working)
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def stop(self, grace_s: float) -> None:
        """Ends what is not done after `grace_s`."""
        if self._working:
            await asyncio.wait(set(self._working), timeout=grace_s)
        for task in self._working:
            task.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
