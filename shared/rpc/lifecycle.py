"""Start and end of a process."""

from __future__ import annotations

import asyncio
import secrets
import signal


def new_epoch() -> str:
    """A boot id: a restarted process gets another one and so cannot be mistaken for its predecessor."""
    return secrets.token_hex(8)


async def stop_signal() -> None:
    """Returns at the first SIGTERM or SIGINT; a second one then kills as usual."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopped.set)
    await stopped.wait()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(name)
