"""No test leaves a task behind."""

from __future__ import annotations

import asyncio

PATIENCE_S = 5.0


async def check_none_is_left() -> None:
    """Asserts that no other task of this loop goes on; those that were cancelled or are at their end may get there."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=PATIENCE_S)
    assert not left, f"left running: {left}"
