"""One service as a child process: started, heard, stopped, and its log kept for when it fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deploy.local.forks import ForkedProcess, Forks

TAIL_LINES = 20


class ChildFailedError(Exception):
    """A child ended, or did not start in time. The text says which, and ends with the last lines of its log."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """Where a service listens, in its own words (`shared.telemetry.announce`)."""

    name: str
    role: str
    address: str
    metrics_address: str
    http_address: str = ""
    """Empty where no HTTP is served."""

    @classmethod
    def parse(cls, line: bytes) -> Announcement | None:
        """The announcement in a line of output; None when it is something else."""
        try:
            said = json.loads(line)
            if said["event"] != "listening":
                return None
            return cls(
                name=said["name"],
                role=said["role"],
                address=said["address"],
                metrics_address=said["metrics"],
                http_address=said.get("http", ""),
            )
        except (ValueError, KeyError, TypeError):
            return None


class Child:
    """A process in a group of its own, so that ctrl-C reaches the launcher only, which then stops in order."""

    def __init__(self, name: str, process: ForkedProcess, log: Path, *, roles: int) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._roles = roles
        self._heard: list[Announcement] = []
        self._all_heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read_output())

    @classmethod
    async def start(
        cls, forks: Forks, module: str, name: str, flags: list[str], *, log_dir: Path, roles: int = 1
    ) -> Child:
        """Runs `python -m MODULE FLAGS`; its stderr and what it prints go to `log_dir/NAME.log`.

        Args:
            roles: Announcements to wait for.
        """
        log = log_dir / f"{name}.log"
        return cls(name, await forks.start(module, flags, log=log), log, roles=roles)

    @property
    def pid(self) -> int:
        """Of the process and of its group."""
        return self._process.pid

    async def announcements(self, timeout_s: float) -> list[Announcement]:
        """Where the child listens, one entry per role, once all do.

        Raises:
            ChildFailedError: It ended first, or said nothing for `timeout_s`.
        """
        either: set[asyncio.Future[Any]] = {self._all_heard, self._reading}
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._all_heard.done():
            return self._heard
        if not self._reading.done():
            raise ChildFailedError(f"{self.name} did not listen within {timeout_s:g} s\n{self.log_tail()}")
        return await self.end()

    async def end(self) -> NoReturn:
        """Waits for the process to end, which nobody asked it to.

        Raises:
            ChildFailedError: Always.
        """
        code = await self._process.wait()
        raise ChildFailedError(f"{self.name} ended with exit code {code}\n{self.log_tail()}")

    async def stop(self, grace_s: float) -> int:
        """Sends SIGTERM, and SIGKILL to the whole group after `grace_s`; returns the exit code. May be repeated."""
        if self._process.returncode is None:
            self._signal(signal.SIGTERM)
            ending = asyncio.create_task(self._process.wait())
            await asyncio.wait({ending}, timeout=grace_s)
            if not ending.done():
                self._signal(signal.SIGKILL)
            await ending
        await self._reading
        return self._process.returncode or 0

    def log_tail(self) -> str:
        """The last lines of the log, indented."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(f"  {self.name} | {line}" for line in lines)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            # it has just ended by itself
            return

    async def _read_output(self) -> None:
        """Reads to the end, so that the child never blocks on a full pipe."""
        async for line in self._process.output:
            said = Announcement.parse(line)
            if said is None or self._all_heard.done():
                with self.log.open("ab") as log:
                    log.write(line)
                continue
            self._heard.append(said)
            if len(self._heard) == self._roles:
                self._all_heard.set_result(None)
