"""Looking on while a load runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any


@contextlib.asynccontextmanager
async def meanwhile(look_on: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """While open, `look_on` runs in a task of its own; an error that has ended it comes out at the end."""
    looking = asyncio.create_task(look_on)
    try:
        yield
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
