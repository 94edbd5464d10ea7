"""Hands an arena's descriptor to decode workers on the same host: SCM_RIGHTS over a Unix socket.

The socket lies in a private (0700) directory; whoever may enter it, container or not, may read parcels. One
connection, one message: a JSON line with the arena's epoch and capacity, and the descriptor beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from shared.errors import FailedPreconditionError
from shared.kv.arena import Arena, ArenaView

log = logging.getLogger(__name__)

MAX_GREETING_BYTES = 4096
MAX_ARENA_BYTES = 1 << 40
CONNECT_TIMEOUT_S = 2.0
ACCEPT_RETRY_S = 0.5
# sun_path holds 108 bytes with the closing NUL
MAX_SOCKET_PATH = 107


class ArenaServer:
    """Passes one arena to every peer that connects to `path`, from the event loop that started it."""

    def __init__(self, listener: socket.socket, path: Path, arena: Arena, epoch: str) -> None:
        self._listener = listener
        self._arena = arena
        self._greeting = json.dumps({"epoch": epoch, "capacity": arena.capacity}).encode()
        self._task = asyncio.get_running_loop().create_task(self._accept())
        self.path = path

    @classmethod
    def start(cls, directory: Path, name: str, arena: Arena, epoch: str) -> ArenaServer:
        """Listens on `directory/name.sock`; the directory is created, or must be private already.

        Raises:
            ValueError: The path is too long for a Unix socket, or others may enter the directory.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_mode & 0o077:
            raise ValueError(f"{directory} must be private (mode 0700): whoever enters it can read parcels")
        path = directory / f"{name}.sock"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise ValueError(f"the socket path {path} is longer than {MAX_SOCKET_PATH} bytes")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        with _alone_in(directory):
            _remove_dead_sockets(directory)
            listener.bind(os.fspath(path))
            listener.listen()
        return cls(listener, path, arena, epoch)

    async def stop(self) -> None:
        """Stops listening and removes the socket file."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._listener.close()
        self.path.unlink(missing_ok=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(self._listener)
            except OSError:
                log.warning("no descriptor left for a peer of the arena; trying again", exc_info=True)
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            # the greeting is far smaller than a socket buffer, so this cannot block
            with peer, contextlib.suppress(OSError):
                socket.send_fds(peer, [self._greeting], [self._arena.fd])


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keeps others out who start now: a socket that is bound and does not listen yet looks like one of the dead."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_dead_sockets(directory: Path) -> None:
    """Those of workers that were killed: nobody listens there, and nobody ever will, as names carry the boot id."""
    for path in directory.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer, contextlib.suppress(FileNotFoundError):
            try:
                peer.setblocking(False)
                peer.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except BlockingIOError:
                # its queue is full: it lives
                continue


def fetch_arena(path: str, epoch: str) -> ArenaView:
    """Maps the arena behind a socket. Blocks for at most 2 s: call it in a thread.

    Raises:
        OSError: Nobody listens there: another host, or the worker is gone.
        FailedPreconditionError: It is not the sealed arena of `epoch`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(CONNECT_TIMEOUT_S)
        peer.connect(path)
        greeting, fds, _, _ = socket.recv_fds(peer, MAX_GREETING_BYTES, 1)
    if len(fds) != 1:
        raise FailedPreconditionError("no arena was handed over", reason="ARENA_GREETING")
    try:
        capacity = _read_greeting(greeting, epoch)
    except BaseException:
        os.close(fds[0])
        raise
    return ArenaView(fds[0], capacity)


def _read_greeting(greeting: bytes, epoch: str) -> int:
    try:
        fields = json.loads(greeting)
        capacity, owner = int(fields["capacity"]), fields["epoch"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FailedPreconditionError("unreadable arena greeting", reason="ARENA_GREETING") from error
    if owner != epoch or not 0 < capacity <= MAX_ARENA_BYTES:
        raise FailedPreconditionError("the arena belongs to another worker", reason="ARENA_EPOCH")
    return capacity
