"""What both storages owe whoever uses them, against plain lists of rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from shared.errors import ResourceExhaustedError, TooLargeError
from shared.kv.layout import KVLayout
from shared.model.spec import TORCH_DTYPES
from tests.unit.decode_worker.pools import POOLS, Pool, Rows, install, memory, poison, step

CAPACITY = 1 << 20
TINY = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
storages = pytest.mark.parametrize("storage", POOLS)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[KVLayout, tuple[int, ...]]:
    layout = KVLayout(
        num_layers=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([1, 3, 8, 63])),
        dtype=draw(st.sampled_from([*TORCH_DTYPES])),
    )
    heads = layout.num_layers * layout.num_kv_heads
    # few different values: neighbouring heads with equal and with unequal counts, at and beside the ends of blocks
    counts = st.lists(st.sampled_from([1, 2, 15, 16, 17, 30]), min_size=heads, max_size=heads)
    return layout, tuple(draw(counts))


@storages
@settings(max_examples=20)
@given(shape=shapes(), growth=st.integers(0, 5), seed=st.integers(0, 99))
def test_what_was_installed_and_appended_is_what_attention_reads(
    storage: str, shape: tuple[KVLayout, tuple[int, ...]], growth: int, seed: int
) -> None:
    layout, num_kept = shape
    pool, rows = POOLS[storage](layout, CAPACITY), Rows(layout, num_kept, seed)
    poison(pool)
    allocation, kv = install(pool, rows, growth)
    rows.check(pool.export(kv))
    for appended in range(growth):
        assert (kv.full, kv.appended) == (False, appended)
        step(pool, [(rows, kv)])
        rows.check(pool.export(kv))
        assert tuple(kv.lengths.ravel()) == rows.num_kept
    assert kv.full
    pool.free(allocation)
    assert pool.used_bytes == 0


@storages
@settings(max_examples=20)
@given(shape=shapes(), stayed=st.integers(0, 4), growth=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_sequence_that_went_out_and_came_back_is_the_same_bit_by_bit(
    storage: str, shape: tuple[KVLayout, tuple[int, ...]], stayed: int, growth: int, seed: int
) -> None:
    layout, num_kept = shape
    pool, made = POOLS[storage](layout, CAPACITY), [Rows(layout, num_kept, seed) for _ in range(2)]
    (_, stays), (allocation, goes) = (install(pool, rows, stayed + growth) for rows in made)
    for _ in range(stayed):
        step(pool, [(made[0], stays)])
        step(pool, [(made[1], goes)])
    exported = pool.export(goes)
    made[1].check(exported)
    pool.free(allocation)
    poison(pool, allocation)
    again = pool.allocate(pool.sequence_bytes(exported.num_kept, growth))
    back = pool.install(again, exported.num_kept, exported.body, growth)
    assert (back.appended, back.room, back.full) == (0, growth, False)
    assert bytes(pool.export(back).body) == bytes(exported.body)
    for _ in range(growth):
        there, here = step(pool, [(made[0], stays)]), step(pool, [(made[1], back)])
        assert all(torch.equal(left, right) for left, right in zip(there, here, strict=True))
    assert stays.full
    assert back.full


@storages
@given(shape=shapes(), growth=st.integers(0, 40))
def test_the_bound_suffices_for_every_parcel_with_that_mean(
    storage: str, shape: tuple[KVLayout, tuple[int, ...]], growth: int
) -> None:
    layout, num_kept = shape
    pool = POOLS[storage](layout, CAPACITY)
    mean = math.ceil(sum(num_kept) / len(num_kept))
    exact, bound = pool.sequence_bytes(num_kept, growth), pool.bound_bytes(mean, growth)
    assert layout.body_bytes([kept + growth for kept in num_kept]) <= exact <= bound
    assert pool.bound_bytes(mean + 1, growth) >= bound <= pool.bound_bytes(mean, growth + 1)


@storages
def test_full_now_and_too_large_for_ever_are_different_errors(storage: str) -> None:
    pool = POOLS[storage](TINY, 4096)
    with pytest.raises(
        TooLargeError, match=rf"may need {pool.capacity + 1} bytes of KV, this worker has {pool.capacity}"
    ):
        pool.allocate(pool.capacity + 1)
    with pytest.raises(TooLargeError):
        pool.check_fits(pool.capacity + 1)
    pool.check_fits(pool.capacity)
    whole = pool.allocate(pool.capacity)
    assert pool.used_bytes == whole.nbytes == pool.capacity
    with pytest.raises(ResourceExhaustedError, match="full") as caught:
        pool.allocate(1)
    assert not isinstance(caught.value, TooLargeError)
    assert (caught.value.reason, caught.value.retryable) == ("KV_FULL", True)
    assert caught.value.retry_after_s is not None
    pool.check_fits(pool.capacity)  # asks about for ever, not about now
    pool.free(whole)
    pool.free(pool.allocate(pool.capacity))
    pool.check_integrity()


@storages
def test_what_the_bound_had_too_much_can_be_used_by_others(storage: str) -> None:
    pool = POOLS[storage](TINY, 8192)
    needed = pool.sequence_bytes((2,), 0)
    allocation = pool.shrink(pool.allocate(pool.capacity), needed)
    assert needed <= pool.used_bytes == allocation.nbytes < pool.capacity
    others = pool.allocate(pool.capacity - allocation.nbytes)
    pool.check_integrity()
    assert pool.used_bytes == pool.capacity
    for each in (allocation, others):
        pool.free(each)
    assert pool.used_bytes == 0


@storages
def test_giving_back_twice_and_growing_by_shrinking_are_bugs(storage: str) -> None:
    pool = POOLS[storage](TINY, 8192)
    allocation = pool.allocate(pool.sequence_bytes((2,), 0))
    with pytest.raises(AssertionError, match="cannot grow"):
        pool.shrink(allocation, pool.capacity)
    pool = POOLS[storage](TINY, 8192)
    allocation = pool.allocate(pool.sequence_bytes((2,), 0))
    pool.free(allocation)
    with pytest.raises(AssertionError):
        pool.free(allocation)


LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32")
SMALL = 8 << 10


class Life(RuleBasedStateMachine):
    """Sequences come, grow, move and go; each reads its own rows for ever, and freed memory is used again."""

    storage: str
    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool: Pool = POOLS[self.storage](LAYOUT, SMALL)
        poison(self.pool)
        self.addresses = [rows.data_ptr() for rows in memory(self.pool)]
        self.live: dict[int, tuple[Rows, Any, Any]] = {}
        self.number = 0

    @rule(
        target=sequences,
        num_kept=st.tuples(*[st.integers(1, 20)] * 4),
        growth=st.integers(0, 8),
        spare=st.integers(0, 500),
    )
    def come(self, num_kept: tuple[int, ...], growth: int, spare: int) -> Any:
        """As a reservation does: more than is needed first."""
        self.number += 1
        rows, nbytes = Rows(LAYOUT, num_kept, self.number), self.pool.sequence_bytes(num_kept, growth)
        try:
            allocation = self.pool.allocate(nbytes + spare)
        except ResourceExhaustedError:
            return multiple()
        kv = self.pool.install(allocation, num_kept, rows.body, growth)
        self.live[self.number] = (rows, kv, self.pool.shrink(allocation, nbytes))
        return self.number

    @rule(batch=st.sets(sequences, max_size=4))
    def step(self, batch: set[int]) -> None:
        present = [self.live[number][:2] for number in batch if number in self.live]
        present = [(rows, kv) for rows, kv in present if not kv.full]
        if present:
            step(self.pool, present)

    @rule(number=sequences, growth=st.integers(0, 8))
    def move(self, number: int, growth: int) -> None:
        """Out, and in again elsewhere when there is room."""
        if number not in self.live:
            return
        rows, kv, allocation = self.live.pop(number)
        exported = self.pool.export(kv)
        rows.check(exported)
        self.leave(allocation)
        try:
            again = self.pool.allocate(self.pool.sequence_bytes(exported.num_kept, growth))
        except ResourceExhaustedError:
            return
        self.live[number] = (rows, self.pool.install(again, exported.num_kept, exported.body, growth), again)

    @rule(number=consumes(sequences))
    def go(self, number: int) -> None:
        if number in self.live:
            self.leave(self.live.pop(number)[2])

    def leave(self, allocation: Any) -> None:
        self.pool.free(allocation)
        poison(self.pool, allocation)

    @invariant()
    def everyone_has_their_own(self) -> None:
        for rows, kv, _ in self.live.values():
            rows.check(self.pool.export(kv))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check_integrity()
        assert self.pool.used_bytes == sum(allocation.nbytes for _, _, allocation in self.live.values())
        assert 0 <= self.pool.fragmentation <= 1
        assert [rows.data_ptr() for rows in memory(self.pool)] == self.addresses, "allocated once"

    def teardown(self) -> None:
        for _, _, allocation in self.live.values():
            self.pool.free(allocation)
        assert (self.pool.used_bytes, self.pool.fragmentation) == (0, 0)
        assert self.pool.allocate(self.pool.capacity).nbytes == self.pool.capacity


class SlabLife(Life):
    storage = "slabs"


class BlockLife(Life):
    storage = "blocks of 3"


for machine in (SlabLife, BlockLife):
    machine.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestSlabLife, TestBlockLife = SlabLife.TestCase, BlockLife.TestCase
