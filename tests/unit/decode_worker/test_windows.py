"""Layers with a window: every storage shows a token what it may see, however long the answer gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.kv_pool.seen_rows import SeenRows
from decode_worker.kv_pool.slabs import SlabPool
from shared.kernels.dispatch import kernels_for
from shared.kernels.reference.slab_attention import slab_attention
from shared.kv.layout import KVLayout
from tests.unit.decode_worker.pools import CPU, POOLS, Pool, block_pool, poison, step
from tests.unit.decode_worker.sighted import SightedRows, first_seen, install_sighted, some_seen
from tests.unit.decode_worker.test_replay_rows import at_once, one_by_one

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=16, dtype="float32", windows=(6, 0, 6, 3))
# shorter than every window, as long as one, and longer
LENGTHS = (1, 2, 5, 6, 30)
STEPS = 15


def in_torch(layout: KVLayout, capacity: int) -> Pool:
    pool = SlabPool(capacity, layout)
    pool._kernel = slab_attention
    return pool


STORAGES: dict[str, Callable[[KVLayout, int], Pool]] = {**POOLS, "slabs in torch": in_torch}
CAPACITY = 1 << 18


@pytest.fixture(params=STORAGES)
def pool(request: pytest.FixtureRequest) -> Pool:
    made = STORAGES[request.param](LAYOUT, CAPACITY)
    poison(made)
    return made


@st.composite
def prompts(draw: st.DrawFn) -> tuple[KVLayout, SightedRows]:
    windows = draw(st.lists(st.sampled_from([0, 2, 3, 9, 20]), min_size=1, max_size=4).filter(any))
    layout = KVLayout(num_layers=len(windows), num_kv_heads=2, head_dim=3, dtype="float32", windows=tuple(windows))
    length = draw(st.integers(1, 40))
    kept = some_seen(layout, length, draw(st.integers(0, 99)), every=draw(st.booleans()))
    return layout, SightedRows(layout, length, kept, 0)


@given(prompts(), st.integers(0, 50), st.integers(0, 50))
def test_the_first_row_in_sight_is_that_of_the_definition(
    prompt: tuple[KVLayout, SightedRows], age: int, appended: int
) -> None:
    layout, rows = prompt
    manifest = rows.manifest()
    manifest.check()
    seen = SeenRows.of(manifest)
    assert seen is not None
    expected = first_seen(rows, age + appended, layout)
    assert seen.first(age + appended, layout).tolist() == expected
    assert replace(seen, age=age).first(appended, layout).tolist() == expected


def test_a_batch_sees_what_it_may_while_answers_cross_their_windows(pool: Pool) -> None:
    batch = []
    for seed, length in enumerate(LENGTHS):
        rows = SightedRows(LAYOUT, length, some_seen(LAYOUT, length, seed), seed)
        batch.append((rows, install_sighted(pool, rows, STEPS)[1]))
    for number in range(STEPS):
        # some leave the batch for a while
        step(pool, [each for index, each in enumerate(batch) if (index + number) % 4])


def test_who_leaves_the_pool_and_comes_back_sees_the_same(pool: Pool) -> None:
    rows = SightedRows(LAYOUT, 30, some_seen(LAYOUT, 30, 1), 1)
    allocation, kv = install_sighted(pool, rows, STEPS)
    for number in range(STEPS):
        if number % 4 == 3:
            exported = pool.export(kv)
            pool.free(allocation)
            poison(pool, allocation)
            allocation = pool.allocate(pool.sequence_bytes(exported.num_kept, STEPS))
            kv = pool.install(allocation, exported.num_kept, exported.body, STEPS, None, exported.seen)
        step(pool, [(rows, kv)])


def test_many_steps_at_once_see_what_each_would_see(pool: Pool) -> None:
    first, second = (SightedRows(LAYOUT, 8, some_seen(LAYOUT, 8, 3), 3) for _ in range(2))
    tokens = [[first.token() for _ in range(8)] for _ in range(LAYOUT.num_layers)]
    expected = one_by_one(pool, install_sighted(pool, first, 9)[1], tokens)
    found = at_once(pool, install_sighted(pool, second, 9)[1], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["slabs", "blocks of 16"], indirect=True)
def test_without_its_windows_a_sequence_is_not_stepped(pool: Pool) -> None:
    rows = SightedRows(LAYOUT, 30, some_seen(LAYOUT, 30, 1), 1)
    allocation = pool.allocate(pool.sequence_bytes(rows.num_kept, 1))
    kv = pool.install(allocation, rows.num_kept, rows.body, 1)
    with pytest.raises(AssertionError, match="would see too much"):
        pool.attention([kv])


def test_padding_rows_see_their_one_token_for_ever() -> None:
    pool = block_pool(LAYOUT, block_size=4)
    windows = pool.tables.windows
    assert windows is not None
    rows = SightedRows(LAYOUT, 30, some_seen(LAYOUT, 30, 1), 1)
    _, kv = install_sighted(pool, rows, STEPS)
    (slot,) = pool.tables.bind([kv])
    for _ in range(STEPS):
        pool.tables.advance(torch.tensor([slot, pool.tables.trash, pool.tables.trash]))
        for layer in LAYOUT.windowed_layers:
            first = windows.first(layer)
            assert first is not None
            assert first[pool.tables.trash].tolist() == [0, 0]
    assert windows.first(1) is None


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 99))
def test_the_gpu_s_kernels_see_the_same(seed: int) -> None:
    triton = pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    assert triton
    layout = replace(LAYOUT, num_layers=2, windows=(6, 0))
    pool = block_pool(layout, block_size=4, kernels=kernels_for(CPU, "triton"))
    poison(pool)
    rows = SightedRows(layout, 12, some_seen(layout, 12, seed), seed)
    _, kv = install_sighted(pool, rows, 4)
    for _ in range(4):
        step(pool, [(rows, kv)])
