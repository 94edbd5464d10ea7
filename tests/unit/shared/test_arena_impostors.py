"""Whoever answers on the socket of an arena is not believed, and leaves no descriptor behind."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import FailedPreconditionError
from shared.kv import arena_socket
from shared.kv.arena import SEALS
from shared.kv.arena_socket import fetch_arena
from tests.unit.shared.descriptors import no_descriptor_leaks
from tests.unit.shared.test_arena import memfd

EPOCH, CAPACITY = "epoch-1", 3 * mmap.PAGESIZE


@contextlib.contextmanager
def impostor(path: Path, greeting: bytes, *fds: int) -> Iterator[str]:
    """Answers one connection with a greeting and descriptors of its own."""

    def answer() -> None:
        peer, _ = listener.accept()
        with peer:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            if greeting:
                peer.sendmsg([greeting], rights)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        yield str(path)
        thread.join(20)


def hello(**fields: object) -> bytes:
    return json.dumps({"epoch": EPOCH, "capacity": CAPACITY, **fields}).encode()


GREETINGS = {
    "another epoch": hello(epoch="other"),
    "no epoch": hello(epoch=None),
    "no bytes": hello(capacity=0),
    "fewer bytes": hello(capacity=CAPACITY - 1),
    "more bytes": hello(capacity=CAPACITY + 1),
    "a negative capacity": hello(capacity=-CAPACITY),
    "an enormous capacity": hello(capacity=1 << 41),
    "an infinite capacity": b'{"epoch": "epoch-1", "capacity": 1e999}',
    "no number": hello(capacity="many"),
    "a list": b"[1, 2]",
    "no JSON": b"\xff\xfe",
    "half of it": hello()[:10],
    "deep nesting": b"[" * 4000,
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS.keys())
def test_a_greeting_that_does_not_fit_is_refused(socket_dir: Path, greeting: bytes) -> None:
    with no_descriptor_leaks():
        fd = memfd(CAPACITY, SEALS)
        with impostor(socket_dir / "s", greeting, fd) as path, pytest.raises(FailedPreconditionError):
            fetch_arena(path, EPOCH)
        os.close(fd)


def test_the_impostor_itself_would_be_believed_with_a_fitting_greeting(socket_dir: Path) -> None:
    fd = memfd(CAPACITY, SEALS)
    with impostor(socket_dir / "s", hello(), fd) as path:
        assert fetch_arena(path, EPOCH).capacity == CAPACITY
    os.close(fd)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW], ids=["none", "grow"])
def test_an_unsealed_memory_file_is_refused(socket_dir: Path, seals: int) -> None:
    with no_descriptor_leaks():
        fd = memfd(CAPACITY, seals)
        with impostor(socket_dir / "s", hello(), fd) as path, pytest.raises(FailedPreconditionError):
            fetch_arena(path, EPOCH)
        os.close(fd)


def test_a_plain_file_is_refused(socket_dir: Path) -> None:
    (socket_dir / "file").write_bytes(bytes(CAPACITY))
    with no_descriptor_leaks():
        fd = os.open(socket_dir / "file", os.O_RDONLY)
        with impostor(socket_dir / "s", hello(), fd) as path, pytest.raises(FailedPreconditionError):
            fetch_arena(path, EPOCH)
        os.close(fd)


@pytest.mark.parametrize("greeting", [b"", hello()])
def test_a_greeting_without_a_descriptor_is_refused(socket_dir: Path, greeting: bytes) -> None:
    with no_descriptor_leaks(), impostor(socket_dir / "s", greeting) as path, pytest.raises(FailedPreconditionError):
        fetch_arena(path, EPOCH)


def test_more_descriptors_than_asked_for_are_not_kept(socket_dir: Path) -> None:
    with no_descriptor_leaks():
        fd = memfd(CAPACITY, SEALS)
        with impostor(socket_dir / "s", hello(), fd, fd, fd) as path:
            reader = fetch_arena(path, EPOCH)
        del reader
        os.close(fd)


def test_a_peer_that_says_nothing_times_out(socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_socket, "CONNECT_TIMEOUT_S", 0.1)
    with no_descriptor_leaks(), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_dir / "s"))
        listener.listen()
        with pytest.raises(OSError):
            fetch_arena(str(socket_dir / "s"), EPOCH)
