"""`python -m deploy.local.fork_server CONTROL_FD MODULE...`: starts processes, those of the named modules as its forks.

Importing torch and transformers takes seconds of a core. A process that has done so once is forked in milliseconds:
all workers of a machine start for the price of one, and one that is started again hardly disturbs its peers. Android's
zygote does this, and the fork server of `multiprocessing`, whose orders are pickles.

A message on the control socket is JSON with three descriptors: where to report to, stdout and stderr of the process.
Reported are its pid and, at its end, its exit code, a line each. Everything ends with the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.parent import die_with

STDOUT, STDERR = 1, 2
MESSAGE_BYTES = 1 << 18
DESCRIPTORS = 3


@dataclass(frozen=True)
class Become:
    """What a fork has to turn into."""

    module: str
    flags: tuple[str, ...]
    imported: bool
    """Whether its imports are done; otherwise it starts afresh."""

    def run(self) -> None:
        """Does as `python -m MODULE FLAGS` would."""
        if not self.imported:
            os.execv(sys.executable, [sys.executable, "-m", self.module, *self.flags])  # noqa: S606 - no shell needed
        # what ps and top call it; its command line stays that of the server
        Path("/proc/self/comm").write_text(self.module)
        sys.argv = [self.module, *self.flags]
        # imported as a module, it has not run as a program yet
        del sys.modules[_program(self.module)]
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)


class ForkServer:
    """Owner of the processes that it has started. Has one thread, as a process that forks should."""

    def __init__(self, control: socket.socket, imported: Sequence[str]) -> None:
        self._control = control
        self._imported = frozenset(imported)
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def serve(self) -> Become | None:
        """Starts what is asked for until the launcher hangs up; returns a second time in each fork, with its task."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._report_end(key.fd, *key.data)
                    continue
                message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, DESCRIPTORS)
                if not message:
                    return None
                if task := self._fork(json.loads(message), descriptors):
                    return task

    def _fork(self, asked: dict[str, Any], descriptors: Sequence[int]) -> Become | None:
        report, stdout, stderr = descriptors
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(report)
            self._leave(server, stdout, stderr)
            return Become(asked["module"], tuple(asked["flags"]), imported=asked["module"] in self._imported)
        os.close(stdout)
        os.close(stderr)
        reporter = socket.socket(fileno=report)
        _say(reporter, pid)
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, reporter))
        return None

    def _leave(self, server: int, stdout: int, stderr: int) -> None:
        """In a fork: lets go of what is the server's, and takes what is its own."""
        for key in tuple(self._selector.get_map().values()):
            os.close(key.fd)
            if key.data is not None:
                key.data[1].close()
        self._selector.close()
        self._control.detach()
        os.setsid()
        die_with(server)
        for its_own, place in ((stdout, STDOUT), (stderr, STDERR)):
            os.dup2(its_own, place)
            os.close(its_own)

    def _report_end(self, pidfd: int, pid: int, reporter: socket.socket) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        with reporter:
            _say(reporter, os.waitstatus_to_exitcode(status))


def main() -> None:
    """Imports, then serves; in a fork, runs what was asked for."""
    control, *modules = sys.argv[1:]
    for module in modules:
        # what is wrong with it shows in the log of the process that needs it
        with contextlib.suppress(Exception):
            importlib.import_module(_program(module))
    # the collector must not touch, and thereby copy, what the forks share
    gc.collect()
    gc.freeze()
    imported = [module for module in modules if _program(module) in sys.modules]
    if task := ForkServer(socket.socket(fileno=int(control)), imported).serve():
        task.run()


def _program(module: str) -> str:
    return f"{module}.__main__"


def _say(reporter: socket.socket, number: int) -> None:
    # a launcher that does not listen any more is about to end everything
    with contextlib.suppress(OSError):
        reporter.sendall(b"%d\n" % number)


if __name__ == "__main__":
    main()
