"""Families of sequences that read the same first rows: each is as if it had them for itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from decode_worker.kv_pool.parts import divided, joined
from decode_worker.promise import own_rows
from shared.errors import ResourceExhaustedError
from shared.kv.layout import KVLayout
from tests.unit.decode_worker.pools import POOLS, Pool, Rows, memory, poison, step

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32")
SMALL = 24 << 10
COUNTS = st.tuples(*[st.integers(1, 40)] * 4)


@given(first=st.tuples(*[st.integers(0, 6)] * 4), rest=st.tuples(*[st.integers(0, 6)] * 4))
def test_the_parts_of_a_body_make_it_up(first: tuple[int, ...], rest: tuple[int, ...]) -> None:
    counts = tuple(np.add(first, rest).tolist())
    rows = Rows(LAYOUT, counts, 1)
    front, back = divided(LAYOUT, counts, rows.body, first)
    assert bytes(joined(LAYOUT, first, front, rest, back)) == bytes(rows.body)
    for part, begins in ((front, [0] * 4), (back, first)):
        lengths = first if part is front else rest
        cut = Rows(LAYOUT, counts, 1)
        cut.pairs = [
            (key[begin : begin + length], value[begin : begin + length])
            for (key, value), begin, length in zip(cut.pairs, begins, lengths, strict=True)
        ]
        if part is not front or any(rest):
            assert bytes(part) == bytes(cut.body)


@dataclass(eq=False)
class Family:
    """Rows in common, and who reads them: by number its rows, its KV, and its own memory."""

    counts: tuple[int, ...]
    allocation: Any = None
    kv: Any = None
    members: dict[int, tuple[Rows, Any, Any]] = field(default_factory=dict)


class Life(RuleBasedStateMachine):
    """Members come, go on, move out and in, and go; what they share goes with the last and comes with the first."""

    storage: str
    families = Bundle("families")

    def __init__(self) -> None:
        super().__init__()
        self.pool: Pool = POOLS[self.storage](LAYOUT, SMALL)
        poison(self.pool)
        self.live: list[Family] = []
        self.outside: list[tuple[Family, int, Rows, Any]] = []
        self.number = 0

    @rule(
        target=families,
        counts=COUNTS,
        fed=st.integers(0, 4),
        growth=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    )
    def come(self, counts: tuple[int, ...], fed: int, growth: list[int]) -> Any:
        """The first has `fed` rows of its own already."""
        self.number += 1
        shared = self.pool.shareable(counts)
        prompt = Rows(LAYOUT, counts, self.number)
        begun = [Rows(LAYOUT, counts, self.number) for _ in growth]
        for _ in range(fed):
            for layer in range(LAYOUT.num_layers):
                begun[0].append(layer, *begun[0].token()[1:])
        family = Family(shared)
        taken: list[Any] = []
        try:
            family.allocation = self.pool.allocate(self.pool.sequence_bytes(shared, 0))
            taken.append(family.allocation)
            for rows, more in zip(begun, growth, strict=True):
                taken.append(self.pool.allocate(self.pool.sequence_bytes(own_rows(rows.num_kept, shared), more) or 1))
        except ResourceExhaustedError:
            for allocation in taken:
                self.pool.free(allocation)
            return multiple()
        family.kv = self.pool.install(family.allocation, shared, divided(LAYOUT, counts, prompt.body, shared)[0], 0)
        for number, (rows, more, allocation) in enumerate(zip(begun, growth, taken[1:], strict=True)):
            if number:
                self.pool.hold(family.allocation)
            family.members[number] = (rows, self.branch(family, rows, rows.body, more, allocation), allocation)
        self.live.append(family)
        return family

    def branch(self, family: Family, rows: Rows, body: memoryview, growth: int, allocation: Any) -> Any:
        own = own_rows(rows.num_kept, family.counts)
        rest = divided(LAYOUT, rows.num_kept, body, family.counts)[1]
        return self.pool.install(allocation, own, rest, growth, shared=family.kv)

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        present = [each for family in self.live for each in family.members.values() if not each[1].full]
        if present:
            size = min(8, len(present))
            batch = data.draw(st.lists(st.sampled_from(present), min_size=1, max_size=size, unique_by=id))
            step(self.pool, [(rows, kv) for rows, kv, _ in batch])

    @rule(family=families, data=st.data())
    def move_out(self, family: Family, data: st.DataObject) -> None:
        if family.members:
            number = data.draw(st.sampled_from(sorted(family.members)))
            rows, kv, allocation = family.members.pop(number)
            exported = self.pool.export(kv)
            rows.check(exported)
            self.leave(family, allocation)
            self.outside.append((family, number, rows, exported))

    @rule(growth=st.integers(0, 6), which=st.integers(0, 9))
    def move_in(self, growth: int, which: int) -> None:
        if not self.outside:
            return
        family, number, rows, exported = self.outside.pop(which % len(self.outside))
        first, _ = divided(LAYOUT, exported.num_kept, exported.body, family.counts)
        try:
            own = self.pool.sequence_bytes(own_rows(exported.num_kept, family.counts), growth) or 1
            allocation = self.pool.allocate(own)
        except ResourceExhaustedError:
            return
        if family.allocation is None:
            try:
                family.allocation = self.pool.allocate(self.pool.sequence_bytes(family.counts, 0))
            except ResourceExhaustedError:
                self.pool.free(allocation)
                return
            family.kv = self.pool.install(family.allocation, family.counts, first, 0)
        else:
            self.pool.hold(family.allocation)
        family.members[number] = (rows, self.branch(family, rows, exported.body, growth, allocation), allocation)

    @rule(family=consumes(families), data=st.data())
    def go(self, family: Family, data: st.DataObject) -> None:
        for number in data.draw(st.permutations(sorted(family.members))):
            self.leave(family, family.members.pop(number)[2])
            self.everyone_has_their_own()

    def leave(self, family: Family, allocation: Any) -> None:
        last = self.pool.holders(family.allocation) == 1
        for memory_of in (allocation, family.allocation):
            self.pool.free(memory_of)
        poison(self.pool, allocation)
        if last:
            poison(self.pool, family.allocation)
            family.allocation = family.kv = None

    @invariant()
    def everyone_has_their_own(self) -> None:
        for family in self.live:
            for rows, kv, _ in family.members.values():
                rows.check(self.pool.export(kv))

    @invariant()
    def what_is_shared_counts_once(self) -> None:
        self.pool.check_integrity()
        own = sum(each[2].nbytes for family in self.live for each in family.members.values())
        shared = sum(family.allocation.nbytes for family in self.live if family.allocation is not None)
        assert self.pool.used_bytes == own + shared
        for family in self.live:
            assert bool(family.members) == (family.allocation is not None)
            if family.allocation is not None:
                assert self.pool.holders(family.allocation) == len(family.members)

    def teardown(self) -> None:
        for family in self.live:
            for _, _, allocation in family.members.values():
                self.pool.free(allocation)
                self.pool.free(family.allocation)
        assert self.pool.used_bytes == 0


class SlabLife(Life):
    storage = "slabs"


class BlockLife(Life):
    storage = "blocks of 3"


for machine in (SlabLife, BlockLife):
    machine.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestSlabLife, TestBlockLife = SlabLife.TestCase, BlockLife.TestCase


@pytest.mark.parametrize("storage", POOLS)
@given(counts=COUNTS, growth=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_the_bounds_suffice(storage: str, counts: tuple[int, ...], growth: int) -> None:
    pool = POOLS[storage](LAYOUT, SMALL)
    shared = pool.shareable(counts)
    mean = -(-sum(counts) // 4)
    assert pool.sequence_bytes(shared, 0) <= pool.shared_bound_bytes(mean)
    assert pool.sequence_bytes(own_rows(counts, shared), growth) <= pool.own_bound_bytes(growth)


@pytest.mark.parametrize("storage", POOLS)
def test_the_law_notices_a_holder_of_what_is_free(storage: str) -> None:
    pool = POOLS[storage](LAYOUT, SMALL)
    allocation = pool.allocate(2000)
    pool.hold(allocation)
    pool.check_integrity()
    pool._free(allocation)
    with pytest.raises(AssertionError, match="while someone holds it"):
        pool.check_integrity()


def test_nobody_writes_to_what_is_shared() -> None:
    pool = POOLS["slabs"](LAYOUT, SMALL)
    rows = Rows(LAYOUT, (5, 6, 7, 8), 1)
    allocation = pool.allocate(pool.sequence_bytes(rows.num_kept, 0))
    shared = pool.install(allocation, rows.num_kept, rows.body, 0)
    before = [bytes(piece[allocation.offset : allocation.end].numpy()) for piece in memory(pool)]
    members = [
        (Rows(LAYOUT, rows.num_kept, 1), pool.install(pool.allocate(4000), (0,) * 4, memoryview(b""), 3, shared=shared))
        for _ in range(3)
    ]
    for _ in range(3):
        step(pool, members)
    assert [bytes(piece[allocation.offset : allocation.end].numpy()) for piece in memory(pool)] == before
