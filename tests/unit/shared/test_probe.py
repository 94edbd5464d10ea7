"""The health check of containers: exit code 0 for a process that serves, and otherwise a reason."""

from __future__ import annotations

import asyncio
import sys

from tests.integration.redis_server import free_port
from tests.unit.shared.scripted import run, serving


async def probe(address: str) -> tuple[int | None, str]:
    """Exit code and stderr of the command."""
    command = [sys.executable, "-m", "shared.rpc.probe", "--address", address]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    return process.returncode, said.decode().strip()


def test_only_a_process_that_serves_is_healthy() -> None:
    async def main() -> None:
        async with serving({}) as (server, _):
            assert await probe(server.address) == (1, f"{server.address}: NOT_SERVING")
            await server.set_ready(True)
            assert await probe(server.address) == (0, "")

    run(main)


def test_nobody_is_not_healthy() -> None:
    async def main() -> None:
        address = f"127.0.0.1:{free_port()}"
        assert await probe(address) == (1, f"{address}: UNAVAILABLE")

    run(main)
