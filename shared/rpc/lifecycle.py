"""Start and end of a process."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Coroutine
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def new_epoch() -> str:
    """A boot id: a restarted process gets another one and so cannot be mistaken for its predecessor."""
    return secrets.token_hex(8)


def stop_signal() -> Coroutine[Any, Any, None]:
    """Catches SIGTERM and SIGINT from this call on; the result, when awaited, returns at the first of them.

    So a process arms it before it says that it listens. A second signal then kills as usual.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in SIGNALS:
        loop.add_signal_handler(number, stopped.set)
    return _wait(stopped)


async def _wait(stopped: asyncio.Event) -> None:
    await stopped.wait()
    for number in SIGNALS:
        asyncio.get_running_loop().remove_signal_handler(number)
