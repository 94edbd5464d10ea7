"""The launcher's side of the fork server: processes that are there at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType

from shared.rpc.options import MALLOC_ENVIRONMENT

ROOT = Path(__file__).parents[2]
GPU_DRIVER = Path("/dev/nvidiactl")


class Forks:
    """Use as a context manager: leaving it ends the fork server and every process that it has started.

    May be used from any thread and event loop. The processes have the environment of the moment at which it was
    entered, and the settings of the allocator that workers want.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        """Nothing is started yet.

        Args:
            modules: Packages with a `__main__` that are imported beforehand, for processes that run them. Where there
                is a GPU none is: what an import does to its driver, a fork could not use.
        """
        self._modules = () if GPU_DRIVER.exists() else tuple(modules)

    def __enter__(self) -> Forks:
        self._control, its_own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_own:
            command = (sys.executable, "-m", "deploy.local.fork_server", str(its_own.fileno()))
            self._server = subprocess.Popen(
                [*command, *self._modules],
                cwd=ROOT,
                env={**MALLOC_ENVIRONMENT, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(its_own.fileno(),),
                # ctrl-C reaches the launcher only, which then stops in order
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._control.close()
        self._server.wait()

    async def start(self, module: str, flags: Sequence[str], *, log: Path) -> ForkedProcess:
        """Runs `python -m MODULE FLAGS` in a session of its own.

        Args:
            log: Its stderr is written there.

        Raises:
            OSError: The fork server has ended.
        """
        order = json.dumps({"module": module, "flags": list(flags)}).encode()
        report, its_report = socket.socketpair()
        output, its_output = socket.socketpair()
        with contextlib.ExitStack() as not_started:
            not_started.enter_context(report)
            not_started.enter_context(output)
            with its_report, its_output, log.open("wb") as stderr:
                descriptors = [its_report.fileno(), its_output.fileno(), stderr.fileno()]
                socket.send_fds(self._control, [order], descriptors)
            process = await ForkedProcess.of(report, output)
            not_started.pop_all()
        return process


class ForkedProcess:
    """A process that the fork server has started. Lives on the event loop."""

    def __init__(self, pid: int, report: AsyncIterator[bytes], output: AsyncIterator[bytes]) -> None:
        self.pid = pid
        """Of the process, of its session and of its group."""
        self.output = output
        """The lines that it prints."""
        self._ending = asyncio.create_task(_end(report))

    @classmethod
    async def of(cls, report: socket.socket, output: socket.socket) -> ForkedProcess:
        """The process about which the fork server reports, and from whose output is read."""
        reports = _lines(report)
        if not (pid := await anext(reports, b"")):
            raise OSError("the fork server has ended")
        return cls(int(pid), reports, _lines(output))

    @property
    def returncode(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; None while it runs."""
        return self._ending.result() if self._ending.done() else None

    async def wait(self) -> int:
        """Waits for the end; returns the exit code."""
        return await asyncio.shield(self._ending)


async def _end(reports: AsyncIterator[bytes]) -> int:
    # its processes end with the server, of whose end nobody reports
    code = -signal.SIGKILL
    async for line in reports:
        code = int(line)
    return code


async def _lines(end: socket.socket) -> AsyncIterator[bytes]:
    reader, writer = await asyncio.open_connection(sock=end)
    try:
        async for line in reader:
            yield line
    finally:
        writer.close()
        await writer.wait_closed()
