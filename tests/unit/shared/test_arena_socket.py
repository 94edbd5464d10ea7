"""The arena between real processes: handed over once, read for as long as the reader likes, gone without a trace."""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import FailedPreconditionError
from shared.kv import arena_socket
from shared.kv.arena import Arena
from shared.kv.arena_socket import ArenaServer, fetch_arena
from tests.unit.shared.descriptors import no_descriptor_leaks
from tests.unit.shared.scripted import run

EPOCH, CAPACITY = "epoch-1", 3 * mmap.PAGESIZE


class Owner:
    """A running owner process."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-m", "tests.unit.shared.arena_owner", str(directory), EPOCH, str(CAPACITY)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.path = str(directory / "owner.sock")
        self._expect("ready")

    def fill(self, value: int) -> None:
        self.process.stdin.write(f"{value}\n")
        self.process.stdin.flush()
        self._expect("done")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(30) == -signal.SIGKILL

    def _expect(self, word: str) -> None:
        assert self.process.stdout.readline() == f"{word}\n"


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(CAPACITY)
    yield made
    made.close()


@pytest.fixture
def owner(socket_dir: Path) -> Iterator[Owner]:
    made = Owner(socket_dir / "private")
    yield made
    with made.process:
        made.process.kill()


def test_a_reader_sees_what_was_written_before_and_after_it_mapped(owner: Owner) -> None:
    owner.fill(17)
    view = fetch_arena(owner.path, EPOCH).view(0, CAPACITY)
    assert set(view) == {17}
    owner.fill(34)
    assert set(view) == {34}


def test_every_reader_gets_the_same_arena(owner: Owner) -> None:
    views = [fetch_arena(owner.path, EPOCH).view(0, 1) for _ in range(3)]
    owner.fill(51)
    assert [view[0] for view in views] == [51, 51, 51]


def test_the_descriptor_that_a_reader_gets_allows_no_writing(owner: Owner) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(owner.path)
        greeting, (fd,), _, _ = socket.recv_fds(peer, 4096, 1)
    try:
        assert json.loads(greeting) == {"epoch": EPOCH, "capacity": CAPACITY}
        with pytest.raises(PermissionError):
            mmap.mmap(fd, CAPACITY, mmap.MAP_SHARED, mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def arena_mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("vlcache-arena")


def test_a_reader_reads_on_after_its_owner_was_killed_and_nothing_is_left(owner: Owner) -> None:
    mapped = arena_mappings()
    with no_descriptor_leaks():
        reader = fetch_arena(owner.path, EPOCH)
        assert arena_mappings() == mapped + 1
        owner.fill(68)
        owner.kill()
        assert set(reader.view(0, CAPACITY)) == {68}
        assert not Path(f"/proc/{owner.process.pid}").exists()
        with pytest.raises(ConnectionRefusedError):
            fetch_arena(owner.path, EPOCH)
        del reader
    assert arena_mappings() == mapped


def test_an_owner_that_stops_removes_its_socket(owner: Owner) -> None:
    owner.process.stdin.close()
    assert owner.process.wait(30) == 0
    assert not Path(owner.path).exists()
    with pytest.raises(FileNotFoundError):
        fetch_arena(owner.path, EPOCH)


def test_a_restarted_owner_takes_over_the_socket_of_its_predecessor(owner: Owner) -> None:
    owner.kill()
    assert Path(owner.path).exists()
    second = Owner(Path(owner.path).parent)
    with second.process:
        assert len(fetch_arena(owner.path, EPOCH).view(0, CAPACITY)) == CAPACITY
        second.process.kill()


def test_a_new_owner_removes_the_sockets_of_killed_ones_and_of_nobody_else(owner: Owner, arena: Arena) -> None:
    directory = Path(owner.path).parent
    killed = directory / "killed.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(killed))

    async def main() -> None:
        server = ArenaServer.start(directory, "new", arena, EPOCH)
        assert {path.name for path in directory.iterdir()} == {"new.sock", "owner.sock"}
        await server.stop()

    assert killed.exists()
    run(main)
    assert len(fetch_arena(owner.path, EPOCH).view(0, 1)) == 1


def test_an_arena_of_another_boot_is_refused(owner: Owner) -> None:
    with no_descriptor_leaks(), pytest.raises(FailedPreconditionError) as caught:
        fetch_arena(owner.path, "epoch-2")
    assert caught.value.reason == "ARENA_EPOCH"


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_a_directory_that_others_may_enter_is_refused(socket_dir: Path, arena: Arena, mode: int) -> None:
    (socket_dir / "open").mkdir()
    (socket_dir / "open").chmod(mode)

    async def main() -> None:
        with pytest.raises(ValueError, match="must be private"):
            ArenaServer.start(socket_dir / "open", "owner", arena, EPOCH)

    run(main)


def test_a_created_directory_is_private(socket_dir: Path, arena: Arena) -> None:
    async def main() -> None:
        server = ArenaServer.start(socket_dir / "a" / "b", "owner", arena, EPOCH)
        assert (socket_dir / "a" / "b").stat().st_mode & 0o777 == 0o700
        await server.stop()
        assert list((socket_dir / "a" / "b").iterdir()) == []

    run(main)


def test_a_path_that_no_socket_can_have_is_refused(socket_dir: Path, arena: Arena) -> None:
    async def main() -> None:
        room = arena_socket.MAX_SOCKET_PATH - len(os.fsencode(socket_dir)) - len("/.sock")
        with no_descriptor_leaks(), pytest.raises(ValueError, match="longer than 107"):
            ArenaServer.start(socket_dir, "x" * (room + 1), arena, EPOCH)
        await ArenaServer.start(socket_dir, "x" * room, arena, EPOCH).stop()

    run(main)


def test_a_server_outlives_peers_that_leave_and_moments_without_descriptors(
    socket_dir: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_socket, "ACCEPT_RETRY_S", 0.01)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        accept, failures = loop.sock_accept, [OSError("too many open files")]

        async def flaky(listener: socket.socket) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", flaky)
        server = ArenaServer.start(socket_dir / "private", "owner", arena, EPOCH)
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(server.path))
        reader = await asyncio.to_thread(fetch_arena, str(server.path), EPOCH)
        assert reader.capacity == CAPACITY
        assert failures == []
        await server.stop()

    run(main)
