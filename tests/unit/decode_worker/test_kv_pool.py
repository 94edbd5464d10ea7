"""The KV pool against plain numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from decode_worker.kv_pool import TORCH_DTYPES, KVPool, SequenceKV
from shared.errors import ResourceExhaustedError, TooLargeError
from shared.kv.extents import Extent
from shared.kv.layout import KVLayout
from tests.unit.decode_worker.parcels import body_of, manifest_of

DTYPES = [*TORCH_DTYPES]


def read(kv: SequenceKV) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """K and V per layer and head, as attention reads them: the first `length` rows of each slab."""
    layers = []
    for groups in kv:
        heads: list[tuple[np.ndarray, np.ndarray]] = []
        for group in groups:
            assert group.heads == slice(len(heads), len(heads) + group.key.shape[0])
            for key, value in zip(group.key, group.value, strict=True):
                heads.append((key[: group.length].float().numpy(), value[: group.length].float().numpy()))
        layers.append(heads)
    return layers


def poison(pool: KVPool) -> None:
    """Every value of the pool is NaN, in any dtype."""
    pool._bytes.fill_(0xFF)


class Reference:
    """One sequence as lists of rows."""

    def __init__(self, layout: KVLayout, num_kept: tuple[int, ...], seed: int) -> None:
        self.layout, self.num_kept = layout, num_kept
        random = np.random.default_rng(seed)
        self.rows = [[self._random(random, kept) for _ in range(2)] for kept in num_kept]

    def _random(self, random: np.random.Generator, rows: int) -> torch.Tensor:
        values = random.standard_normal((rows, self.layout.head_dim)).astype(np.float32)
        return torch.from_numpy(values).to(TORCH_DTYPES[self.layout.dtype])

    def append(self, random: np.random.Generator, kv: SequenceKV) -> None:
        heads = self.layout.num_kv_heads
        for layer, groups in enumerate(kv):
            key, value = self._random(random, heads), self._random(random, heads)
            for group in groups:
                group.append(key, value)
            for head in range(heads):
                pair = self.rows[layer * heads + head]
                pair[0] = torch.cat([pair[0], key[head : head + 1]])
                pair[1] = torch.cat([pair[1], value[head : head + 1]])

    def check(self, kv: SequenceKV) -> None:
        heads = self.layout.num_kv_heads
        found = read(kv)
        assert len(found) == self.layout.num_layers
        for layer, pairs in enumerate(found):
            assert len(pairs) == heads
            for head, (key, value) in enumerate(pairs):
                wanted_key, wanted_value = self.rows[layer * heads + head]
                np.testing.assert_array_equal(key, wanted_key.float().numpy())
                np.testing.assert_array_equal(value, wanted_value.float().numpy())


@st.composite
def shapes(draw: st.DrawFn) -> tuple[KVLayout, tuple[int, ...]]:
    layout = KVLayout(
        num_layers=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([1, 3, 8, 63])),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    heads = layout.num_layers * layout.num_kv_heads
    # few different values: neighbouring heads with equal and with unequal counts
    counts = st.lists(st.sampled_from([1, 2, 5, 30]), min_size=heads, max_size=heads)
    return layout, tuple(draw(counts))


@given(shape=shapes(), growth=st.integers(0, 6), seed=st.integers(0, 99))
def test_what_was_installed_and_appended_is_what_attention_reads(
    shape: tuple[KVLayout, tuple[int, ...]], growth: int, seed: int
) -> None:
    layout, num_kept = shape
    reference = Reference(layout, num_kept, seed)
    pool = KVPool(1 << 18, layout)
    poison(pool)
    nbytes = pool.sequence_bytes(num_kept, growth)
    assert nbytes == sum((kept + growth) * 2 * layout.row_bytes for kept in num_kept)
    extent = pool.allocate(nbytes)
    body = memoryview(body_of(reference.rows, layout)).toreadonly()
    kv = pool.install(extent, manifest_of(layout, num_kept, body), body, growth)
    reference.check(kv)
    random = np.random.default_rng(seed)
    for _ in range(growth):
        reference.append(random, kv)
        reference.check(kv)
    pool.free(extent)
    assert pool.used_bytes == 0


def test_a_full_sequence_fills_its_extent_to_the_byte() -> None:
    """Nothing beyond the extent is written, and not a byte of it is wasted."""
    layout = KVLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype="bfloat16")
    num_kept, growth = (4, 4, 2, 1, 7, 7), 3
    reference = Reference(layout, num_kept, 0)
    pool = KVPool(1 << 16, layout)
    nbytes = pool.sequence_bytes(num_kept, growth)
    before, extent, after = pool.allocate(64), pool.allocate(nbytes), pool.allocate(64)
    pool._bytes.fill_(0xAB)
    body = memoryview(body_of(reference.rows, layout))
    kv = pool.install(extent, manifest_of(layout, num_kept, body), body, growth)
    for _ in range(growth):
        reference.append(np.random.default_rng(1), kv)
    outside = [*pool._bytes[: extent.offset], *pool._bytes[extent.offset + nbytes :]]
    assert set(map(int, outside)) == {0xAB}
    used = sum(group.key.nbytes + group.value.nbytes for groups in kv for group in groups)
    assert used == nbytes
    with pytest.raises(IndexError):
        reference.append(np.random.default_rng(2), kv)
    for piece in (before, extent, after):
        pool.free(piece)
    pool.check_integrity()


def test_full_now_and_too_large_for_ever_are_different_errors() -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
    pool = KVPool(1024, layout)
    with pytest.raises(TooLargeError, match=r"1025 bytes of KV, this worker has 1024"):
        pool.allocate(1025)
    extent = pool.allocate(1024)
    with pytest.raises(ResourceExhaustedError, match="full") as caught:
        pool.allocate(1)
    assert not isinstance(caught.value, TooLargeError)
    assert caught.value.retryable
    assert caught.value.retry_after_s is not None
    pool.free(extent)
    pool.free(pool.allocate(1024))


def test_what_the_bound_had_too_much_can_be_used_by_others() -> None:
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
    pool = KVPool(1024, layout)
    extent = pool.shrink(pool.allocate(1024), 100)
    assert pool.used_bytes == 128
    other = pool.allocate(1024 - 128)
    pool.check_integrity()
    pool.free(extent)
    pool.free(other)
    assert pool.used_bytes == 0


LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32")


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, grow and go; each reads its own rows for ever, and freed memory is used again."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = KVPool(16 << 10, LAYOUT)
        poison(self.pool)
        self.random = np.random.default_rng(0)
        self.live: list[tuple[Reference, SequenceKV, Extent]] = []

    @rule(
        target=sequences,
        num_kept=st.tuples(*[st.integers(1, 40)] * 4),
        growth=st.integers(0, 8),
        spare=st.integers(0, 2000),
        seed=st.integers(0, 9),
    )
    def come(self, num_kept: tuple[int, ...], growth: int, spare: int, seed: int) -> Any:
        nbytes = self.pool.sequence_bytes(num_kept, growth)
        try:
            extent = self.pool.allocate(nbytes + spare)
        except ResourceExhaustedError:
            return None
        reference = Reference(LAYOUT, num_kept, seed)
        body = memoryview(body_of(reference.rows, LAYOUT))
        kv = self.pool.install(extent, manifest_of(LAYOUT, num_kept, body), body, growth)
        entry = (reference, kv, self.pool.shrink(extent, nbytes))
        self.live.append(entry)
        return (*entry, [growth])

    @rule(sequence=sequences)
    def grow(self, sequence: Any) -> None:
        if sequence is not None and sequence[3][0]:
            sequence[3][0] -= 1
            sequence[0].append(self.random, sequence[1])

    @rule(sequence=consumes(sequences))
    def go(self, sequence: Any) -> None:
        if sequence is None:
            return
        _, kv, extent, _ = sequence
        self.live = [entry for entry in self.live if entry[1] is not kv]
        self.pool.free(extent)
        self.pool._bytes[extent.offset : extent.end] = 0xFF

    @invariant()
    def everyone_reads_their_own(self) -> None:
        for reference, kv, _ in self.live:
            reference.check(kv)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check_integrity()
        assert self.pool.used_bytes == sum(extent.nbytes for _, _, extent in self.live)


PoolMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestPool = PoolMachine.TestCase
