"""The health check of containers: exit code 0 for a process that serves, and otherwise a reason."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.certificates import Certificates, flags
from tests.integration.redis_server import free_port
from tests.unit.shared.scripted import run, serving
from tests.unit.shared.secured import worker


async def probe(address: str, *more: str) -> tuple[int | None, str]:
    """Exit code and stderr of the command."""
    command = [sys.executable, "-m", "shared.rpc.probe", "--address", address, *more]
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


def test_a_process_with_certificates_answers_to_its_own(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)

    async def main() -> None:
        async with worker(certificates.identity("prefill")) as address:
            own = flags(certificates.files("prefill"))
            assert await probe(address, *own) == (1, f"{address}: NOT_SERVING")
            assert await probe(address) == (1, f"{address}: UNAVAILABLE")

    run(main)
