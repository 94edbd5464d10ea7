"""Blocks: what a sequence takes of them, the one that nobody gets, and tables that never name another's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.kv_pool.blocks import TRASH_BLOCK
from shared.kernels.splits import choose_splits
from shared.kv.layout import KVLayout
from tests.unit.decode_worker.pools import Rows, block_pool, install, memory, step

LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype="float16")
TINY = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
counts = st.tuples(*[st.integers(1, 40)] * 6)


@given(num_kept=counts, growth=st.integers(0, 20), block_size=st.sampled_from([1, 3, 16]))
def test_a_sequence_takes_whole_blocks_for_each_head(num_kept: tuple[int, ...], growth: int, block_size: int) -> None:
    pool = block_pool(LAYOUT, 1 << 18, block_size=block_size)
    block_bytes = 2 * block_size * LAYOUT.row_bytes
    blocks = sum(-(-(kept + growth) // block_size) for kept in num_kept)
    assert pool.sequence_bytes(num_kept, growth) == blocks * block_bytes
    allocation, kv = install(pool, Rows(LAYOUT, num_kept, 0), growth)
    assert pool.used_bytes == allocation.nbytes == blocks * block_bytes
    named = [
        table[: -(-(kept + growth) // block_size)]
        for table, kept in zip(kv.blocks.reshape(6, -1), num_kept, strict=True)
    ]
    assert sorted(np.concatenate(named)) == sorted(allocation.blocks), "each block once"
    rest = [table[len(own) :] for table, own in zip(kv.blocks.reshape(6, -1), named, strict=True)]
    assert set(np.concatenate(rest)) <= {TRASH_BLOCK}


@given(num_kept=counts, growth=st.integers(0, 20))
def test_a_bound_is_off_by_less_than_a_block_for_each_head(num_kept: tuple[int, ...], growth: int) -> None:
    pool = block_pool(LAYOUT)
    bound = pool.bound_bytes(-(-sum(num_kept) // 6), growth)
    spare = (bound - LAYOUT.body_bytes([kept + growth for kept in num_kept])) / (2 * LAYOUT.row_bytes)
    assert spare < 6 * 16 + 6, "and by the mean's rounding"


def test_the_trash_block_is_not_part_of_the_pool() -> None:
    pool = block_pool(TINY, 10 * 1024, block_size=16)
    assert (pool.capacity, pool.fragmentation) == (9 * 1024, 0)
    whole = pool.allocate(pool.capacity)
    assert sorted(whole.blocks) == list(range(1, 10))
    assert TRASH_BLOCK not in whole.blocks
    with pytest.raises(ValueError, match="at least 2048 bytes, not 2047"):
        block_pool(TINY, 2047, block_size=16)


def test_what_was_in_use_last_is_used_first() -> None:
    """Its memory may still be in a cache."""
    pool = block_pool(TINY)
    first, second = pool.allocate(4096), pool.allocate(4096)
    pool.free(first)
    assert set(pool.allocate(4096).blocks) == set(first.blocks)
    pool.free(second)


def test_nothing_outside_its_blocks_is_written() -> None:
    pool, rows = block_pool(LAYOUT, block_size=4), Rows(LAYOUT, (4, 4, 2, 1, 7, 7), 0)
    for blocks in memory(pool):
        blocks.fill_(0xAB)
    allocation, kv = install(pool, rows, 3)
    for _ in range(3):
        step(pool, [(rows, kv)])
    others = np.setdiff1d(np.arange(len(pool.key_blocks)), allocation.blocks)
    assert all(bool((blocks[others] == 0xAB).all()) for blocks in memory(pool))


def test_the_law_notices_a_block_that_two_have() -> None:
    pool = block_pool(TINY)
    allocation = pool.allocate(4096)
    pool._stack[0] = allocation.blocks[0]
    with pytest.raises(AssertionError, match="used block is free"):
        pool.check_integrity()
    pool._stack[0] = pool._stack[1]
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity()


def test_the_law_notices_a_lost_block() -> None:
    pool = block_pool(TINY)
    pool._num_free -= 1
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity()
    pool._num_free += 1
    pool.check_integrity()


def test_a_block_is_given_back_once() -> None:
    pool = block_pool(TINY)
    allocation = pool.allocate(4096)
    pool.free(allocation)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(allocation)


def test_a_step_is_split_by_what_is_possible_and_not_by_what_is_there() -> None:
    """A captured graph serves every length."""
    pool = block_pool(TINY, max_tokens=200, block_size=16)
    assert pool.splits(3) == choose_splits(3, 1, 208, 1)
    little = block_pool(TINY, 5 * 1024, max_tokens=200, block_size=16)
    assert little.tables.blocks.shape[-1] == 5, "no sequence has more blocks than the pool"


def test_it_serves_masks_to_nobody() -> None:
    pool, rows = block_pool(TINY), Rows(TINY, (3,), 0)
    _, kv = install(pool, rows, 1)
    query = torch.zeros(1, 1, 1, 8)
    with pytest.raises(AssertionError, match="no mask"):
        pool.attention([kv]).attend(0, query, query, query, torch.zeros(1), 1.0)
