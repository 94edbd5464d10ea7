"""The extent allocator against a map of who owns which byte."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from shared.kv.extents import ALIGNMENT, Extent, ExtentAllocator, aligned

FREE = 0


class Allocations(RuleBasedStateMachine):
    """`owner` maps every 64-byte line of the buffer to the extent that owns it."""

    extents = Bundle("extents")

    @initialize(lines=st.integers(1, 40), surplus=st.integers(0, ALIGNMENT - 1))
    def start(self, lines: int, surplus: int) -> None:
        self.allocator = ExtentAllocator(lines * ALIGNMENT + surplus)
        self.owner = bytearray(lines)
        self.names = itertools.cycle(range(1, 256))
        self.live: dict[Extent, int] = {}

    def runs(self) -> list[tuple[int, int]]:
        """(length, first line) of each maximal free run."""
        found, line = [], 0
        for name, group in itertools.groupby(self.owner):
            length = len(list(group))
            if name == FREE:
                found.append((length, line))
            line += length
        return found

    def take(self, extent: Extent, name: int) -> None:
        assert extent.offset % ALIGNMENT == extent.nbytes % ALIGNMENT == 0, "not aligned"
        lines = slice(extent.offset // ALIGNMENT, extent.end // ALIGNMENT)
        assert 0 <= extent.offset < extent.end <= len(self.owner) * ALIGNMENT, "outside the buffer"
        assert not any(self.owner[lines]), "overlap"
        self.owner[lines] = bytes([name]) * (extent.nbytes // ALIGNMENT)
        self.live[extent] = name

    def clear(self, extent: Extent) -> int:
        lines = slice(extent.offset // ALIGNMENT, extent.end // ALIGNMENT)
        assert set(self.owner[lines]) == {self.live[extent]}
        self.owner[lines] = bytes(extent.nbytes // ALIGNMENT)
        return self.live.pop(extent)

    @rule(target=extents, nbytes=st.integers(1, 12 * ALIGNMENT))
    def allocate(self, nbytes: int) -> object:
        wanted = -(-nbytes // ALIGNMENT)
        fitting = [run for run in self.runs() if run[0] >= wanted]
        extent = self.allocator.allocate(nbytes)
        if not fitting:
            assert extent is None
            return multiple()
        assert extent == Extent(min(fitting)[1] * ALIGNMENT, wanted * ALIGNMENT), "not the best fit"
        self.take(extent, next(name for name in self.names if name not in self.live.values()))
        return extent

    @rule(target=extents, extent=consumes(extents), share=st.floats(0, 1))
    def shrink(self, extent: Extent, share: float) -> Extent:
        kept = self.allocator.shrink(extent, int(share * extent.nbytes))
        name = self.clear(extent)
        assert kept.offset == extent.offset
        assert kept.nbytes == max(ALIGNMENT, aligned(int(share * extent.nbytes)))
        self.take(kept, name)
        return kept

    @rule(extent=consumes(extents))
    def free(self, extent: Extent) -> None:
        self.allocator.free(extent)
        self.clear(extent)
        with pytest.raises(AssertionError):
            self.allocator.free(extent)

    @rule(extent=extents)
    def refuse_what_was_not_allocated(self, extent: Extent) -> None:
        for other in (Extent(extent.offset, extent.nbytes + ALIGNMENT), Extent(extent.offset + 1, extent.nbytes)):
            with pytest.raises(AssertionError):
                self.allocator.free(other)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.allocator.check_integrity()
        used = sum(map(bool, self.owner)) * ALIGNMENT
        assert self.allocator.used_bytes == used
        assert self.allocator.free_bytes == self.allocator.capacity - used
        assert self.allocator.capacity == len(self.owner) * ALIGNMENT

    @invariant()
    def the_largest_piece_is_told_truthfully(self) -> None:
        assert self.allocator.largest_free == max((length for length, _ in self.runs()), default=0) * ALIGNMENT


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_freed_neighbours_become_one_piece_in_any_order() -> None:
    for order in itertools.permutations(range(4)):
        allocator = ExtentAllocator(4 * ALIGNMENT)
        extents = [allocator.allocate(ALIGNMENT) for _ in range(4)]
        assert allocator.allocate(1) is None
        for index in order:
            allocator.free(extents[index])
            allocator.check_integrity()
        assert allocator.allocate(4 * ALIGNMENT) == Extent(0, 4 * ALIGNMENT)


def test_a_shrunken_extent_cannot_be_freed_by_its_old_name() -> None:
    allocator = ExtentAllocator(4 * ALIGNMENT)
    old = allocator.allocate(4 * ALIGNMENT)
    new = allocator.shrink(old, ALIGNMENT)
    with pytest.raises(AssertionError):
        allocator.free(old)
    allocator.free(new)
    assert allocator.free_bytes == 4 * ALIGNMENT


def test_shrinking_cannot_grow() -> None:
    allocator = ExtentAllocator(4 * ALIGNMENT)
    extent = allocator.allocate(ALIGNMENT)
    with pytest.raises(AssertionError):
        allocator.shrink(extent, ALIGNMENT + 1)


@pytest.mark.parametrize("capacity", [-1, 0, ALIGNMENT - 1])
def test_a_buffer_without_one_line_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError):
        ExtentAllocator(capacity)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_empty_extent_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError):
        ExtentAllocator(ALIGNMENT).allocate(nbytes)
