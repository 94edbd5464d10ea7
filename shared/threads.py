"""Work in threads whose memory must outlive its caller."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


async def run_to_end(
    executor: Executor, work: Callable[[], Result], *, on_cancel: Callable[[], None] = lambda: None
) -> Result:
    """Runs `work` in a thread, in the scope of its caller.

    When the caller is cancelled, `on_cancel` is called at once, but the cancellation goes on only after the thread
    has let go: the memory that it reads or writes must not be given to anyone else before.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, contextvars.copy_context().run, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        on_cancel()
        # a second cancellation must not break the promise either
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        if not future.cancelled():
            future.exception()  # whatever it was, nobody is left to hear it
        raise
