"""The two processes of the benchmark: each on a core of its own, with the allocator that workers get."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from shared.rpc.options import MALLOC_ENVIRONMENT

ROOT = Path(__file__).parents[2]
# All samples come as one line.
MAX_LINE_BYTES = 64 << 20
STOP_TIMEOUT_S = 10.0


class Peer:
    """A child that writes one JSON line for each JSON line that it reads, and ends with its stdin."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, module: str, *arguments: str, core: int | None) -> Peer:
        """Runs a module on one core."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            cwd=ROOT,
            env={**MALLOC_ENVIRONMENT, **os.environ},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
        )
        if core is not None:
            # the interpreter has no other thread yet
            os.sched_setaffinity(process.pid, {core})
        return cls(process)

    async def ask(self, **command: Any) -> Any:
        """Sends a command and waits for its answer.

        Raises:
            ChildProcessError: The process ended instead; its stderr says why.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> Any:
        """The next line.

        Raises:
            ChildProcessError: The process ended instead; its stderr says why.
        """
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"a process of the benchmark ended with exit code {await self._process.wait()}")
        return json.loads(line)

    async def stop(self) -> None:
        """Closes its stdin, and kills it if it does not end then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
        except asyncio.TimeoutError:
            self._process.kill()
            await self._process.wait()


def pick_cores() -> tuple[int | None, int | None]:
    """A core for the sender and one for the receiver, as on two hosts; none where only one is allowed.

    Left alone, the kernel puts two processes that wake each other on one core.
    """
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else (None, None)
