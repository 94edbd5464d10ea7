"""Slabs: not a byte wasted, none beyond the extent touched, and what fragmentation means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.kv.extents import ALIGNMENT, Extent
from shared.kv.layout import KVLayout
from tests.unit.decode_worker.pools import Rows, install, slab_pool, step

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype="bfloat16")
TINY = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")


def test_a_full_sequence_fills_its_extent_to_the_byte() -> None:
    pool = slab_pool(LAYOUT, 1 << 16)
    rows, growth = Rows(LAYOUT, (4, 4, 2, 1, 7, 7), 0), 3
    nbytes = pool.sequence_bytes(rows.num_kept, growth)
    assert nbytes == (25 + 6 * growth) * 2 * LAYOUT.row_bytes
    pool._bytes.fill_(0xAB)
    before = pool.allocate(ALIGNMENT)
    extent, kv = install(pool, rows, growth)
    for _ in range(growth):
        step(pool, [(rows, kv)])
    outside = [*pool._bytes[: extent.offset], *pool._bytes[extent.offset + nbytes :]]
    assert set(map(int, outside)) == {0xAB}
    assert before.end == extent.offset
    rows.check(pool.export(kv))
    places = sorted([*kv.key_at.ravel(), *kv.value_at.ravel()])
    assert (places[0] * 2, len(set(places))) == (extent.offset, 2 * len(rows.num_kept)), "slabs begin at the extent"


@pytest.mark.parametrize("num_kept", [(3, 3, 3, 3, 3, 3), (1, 2, 2, 5, 5, 4)])
def test_heads_of_one_length_and_ragged_ones_hold_the_same(num_kept: tuple[int, ...]) -> None:
    """Neighbours of one length are copied at once, others one by one."""
    pool, rows = slab_pool(LAYOUT), Rows(LAYOUT, num_kept, 1)
    _, kv = install(pool, rows, 2)
    step(pool, [(rows, kv)])
    rows.check(pool.export(kv))


def test_the_whole_pool_is_touched_before_it_is_used() -> None:
    """A page fault costs four times the copy that it interrupts."""
    assert torch.count_nonzero(slab_pool(LAYOUT, 1 << 16)._bytes) == 0


def test_an_empty_and_a_full_pool_are_not_fragmented() -> None:
    pool = slab_pool(TINY, 1024)
    assert pool.fragmentation == 0
    whole = pool.allocate(1024)
    assert pool.fragmentation == 0
    pool.free(whole)
    assert pool.fragmentation == 0


def test_fragmentation_is_the_share_of_what_is_free_that_one_sequence_cannot_have() -> None:
    pool = slab_pool(TINY, 1024)
    first, _, third, _ = (pool.allocate(nbytes) for nbytes in (128, 64, 384, 448))
    pool.free(first)
    assert pool.fragmentation == 0, "one piece, however small"
    pool.free(third)
    assert pool.fragmentation == pytest.approx(128 / 512)


@given(sizes=st.lists(st.integers(1, 600), max_size=12), gone=st.sets(st.integers(0, 11)))
def test_what_is_not_fragmented_can_be_had(sizes: list[int], gone: set[int]) -> None:
    pool, held = slab_pool(TINY, 4096), list[Extent]()
    for size in sizes:
        if size <= 4096 - pool.used_bytes and (extent := pool._allocate(size)):
            held.append(extent)
    for number in gone & set(range(len(held))):
        pool.free(held[number])
    free = pool.capacity - pool.used_bytes
    assert 0 <= pool.fragmentation <= 1
    largest = round((1 - pool.fragmentation) * free)
    assert pool._allocate(largest + 1) is None
    assert free == 0 or pool._allocate(largest) is not None
