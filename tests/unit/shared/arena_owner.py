"""A prefill worker's half of the arena in a process of its own.

Usage: python -m tests.unit.shared.arena_owner DIRECTORY EPOCH CAPACITY

Prints `ready`; then each line on stdin is one byte value: the whole arena is filled with it, and `done` printed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from shared.kv.arena import Arena
from shared.kv.arena_socket import ArenaServer


async def main(directory: str, epoch: str, capacity: str) -> None:
    arena = Arena(int(capacity))
    slot = arena.allocate(arena.capacity)
    assert slot is not None
    server = ArenaServer.start(Path(directory), "owner", arena, epoch)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        arena.view(slot, arena.capacity)[:] = bytes([int(line)]) * arena.capacity
        print("done", flush=True)
    await server.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
