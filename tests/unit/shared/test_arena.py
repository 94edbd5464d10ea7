"""The arena: slots on the owner's side, and a view that nobody can write through on the other."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import FailedPreconditionError
from shared.kv.arena import SEALS, Arena, ArenaView, Slot
from tests.unit.shared.descriptors import no_descriptor_leaks

PAGE = mmap.PAGESIZE


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(4 * PAGE)
    yield made
    made.check_integrity()
    made.close()


def taken(slot: Slot | None) -> Slot:
    assert slot is not None
    return slot


def test_a_generation_is_never_given_out_twice(arena: Arena) -> None:
    seen = set()
    for _ in range(50):
        slots = [taken(arena.allocate(PAGE)) for _ in range(3)]
        arena.check_integrity()
        for slot in slots:
            arena.free(slot)
        seen.update(slot.generation for slot in slots)
    assert len(seen) == 150
    assert arena.used_bytes == 0


def test_a_full_arena_gives_no_slot_until_one_is_freed(arena: Arena) -> None:
    slots = [taken(arena.allocate(PAGE)) for _ in range(4)]
    assert arena.used_bytes == arena.capacity == 4 * PAGE
    assert arena.allocate(1) is None
    arena.free(slots[2])
    assert taken(arena.allocate(PAGE)).extent == slots[2].extent


def test_slots_do_not_share_bytes(arena: Arena) -> None:
    first, second = taken(arena.allocate(100)), taken(arena.allocate(100))
    arena.view(first, 100)[:] = b"a" * 100
    arena.view(second, 100)[:] = b"b" * 100
    assert bytes(arena.view(first, 100)) == b"a" * 100


def test_a_freed_slot_cannot_be_viewed_nor_freed_again(arena: Arena) -> None:
    slot = taken(arena.allocate(100))
    arena.free(slot)
    again = taken(arena.allocate(100))
    assert again.extent == slot.extent
    with pytest.raises(AssertionError):
        arena.view(slot, 1)
    with pytest.raises(KeyError):
        arena.free(slot)
    arena.free(again)


def test_a_view_does_not_reach_beyond_its_slot(arena: Arena) -> None:
    slot = taken(arena.allocate(100))
    assert len(arena.view(slot, slot.extent.nbytes)) == slot.extent.nbytes
    with pytest.raises(AssertionError):
        arena.view(slot, slot.extent.nbytes + 1)


def test_a_slot_that_shrinks_keeps_its_beginning_and_gives_back_its_end(arena: Arena) -> None:
    slot = taken(arena.allocate(3 * PAGE))
    arena.view(slot, 3 * PAGE)[:] = b"k" * (3 * PAGE)
    smaller = arena.shrink(slot, PAGE)
    assert (smaller.generation, smaller.extent.offset) == (slot.generation, slot.extent.offset)
    assert arena.used_bytes == PAGE
    other = taken(arena.allocate(3 * PAGE))
    arena.view(other, 3 * PAGE)[:] = b"x" * (3 * PAGE)
    assert bytes(arena.view(smaller, PAGE)) == b"k" * PAGE
    arena.free(smaller)
    with pytest.raises(AssertionError):
        arena.shrink(smaller, 1)


def test_an_arena_is_sealed_and_has_no_name(arena: Arena) -> None:
    assert fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS) == SEALS
    assert os.fstat(arena.fd).st_nlink == 0
    assert not os.get_inheritable(arena.fd)
    assert os.fstat(arena.fd).st_blocks * 512 >= arena.capacity, "the kernel has not promised the memory"


def test_a_peer_can_neither_write_nor_resize(arena: Arena) -> None:
    peer = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(peer, arena.capacity, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.pwrite(peer, b"x", 0)
        for size in (0, PAGE, 8 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(peer, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(peer, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(peer)


def test_a_view_is_read_only_and_shows_later_writes(arena: Arena) -> None:
    slot = taken(arena.allocate(PAGE))
    reader = ArenaView(os.dup(arena.fd), arena.capacity)
    view = reader.view(slot.extent.offset, 5)
    arena.view(slot, 5)[:] = b"hello"
    assert bytes(view) == b"hello"
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 0


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(-1, 1), (0, -1), (0, 4 * PAGE + 1), (4 * PAGE, 1), (1, 4 * PAGE), (2**64 - 1, 2)]
)
def test_bytes_outside_the_arena_are_refused(arena: Arena, offset: int, nbytes: int) -> None:
    reader = ArenaView(os.dup(arena.fd), arena.capacity)
    with pytest.raises(FailedPreconditionError) as caught:
        reader.view(offset, nbytes)
    assert caught.value.reason == "ARENA_BOUNDS"


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (0, 4 * PAGE), (4 * PAGE, 0), (4 * PAGE - 1, 1)])
def test_the_ends_of_the_arena_are_inside(arena: Arena, offset: int, nbytes: int) -> None:
    assert len(ArenaView(os.dup(arena.fd), arena.capacity).view(offset, nbytes)) == nbytes


def test_views_outlive_their_reader_and_leave_no_descriptor(arena: Arena) -> None:
    with no_descriptor_leaks():
        view = ArenaView(os.dup(arena.fd), arena.capacity).view(0, 1)
        assert bytes(view) == b"\0"
        del view


def memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def refused(fd: int, capacity: int) -> str:
    with pytest.raises(FailedPreconditionError) as caught:
        ArenaView(fd, capacity)
    with pytest.raises(OSError):
        os.fstat(fd)  # the view owned it and closed it
    return caught.value.reason


def test_what_is_not_a_sealed_arena_of_the_announced_size_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.write_bytes(bytes(PAGE))
    with no_descriptor_leaks():
        assert refused(memfd(PAGE, 0), PAGE) == "ARENA_SEALS"
        assert refused(memfd(PAGE, fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE), PAGE) == "ARENA_SEALS"
        assert refused(os.open(plain, os.O_RDONLY), PAGE) == "ARENA_SEALS"
        assert refused(os.open("/dev/null", os.O_RDONLY), PAGE) == "ARENA_SEALS"
        for announced in (0, 1, PAGE - 1, PAGE + 1, 1 << 40):
            assert refused(memfd(PAGE, SEALS), announced) == "ARENA_SIZE"
        assert refused(memfd(0, SEALS), 0) == "ARENA_SIZE"


def test_an_arena_that_cannot_be_had_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with no_descriptor_leaks(), pytest.raises(OSError):
        Arena(PAGE)
