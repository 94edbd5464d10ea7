"""The number of splits: enough programs, none too small."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.kernels.splits import MAX_SPLITS, MIN_SPLIT_TOKENS, PROGRAMS_PER_SM, choose_splits

batches = st.integers(1, 512)
heads = st.integers(1, 64)
lengths = st.integers(1, 200_000)
devices = st.integers(1, 200)


@given(batches, heads, lengths, devices)
def test_splits_fill_the_device_but_none_is_too_short(batch: int, kv_heads: int, length: int, sms: int) -> None:
    splits = choose_splits(batch, kv_heads, length, sms)
    assert splits in {2**power for power in range(MAX_SPLITS.bit_length())}
    # the last doubling still found programs to add, and tokens for them
    assert splits == 1 or batch * kv_heads * (splits - 1) < PROGRAMS_PER_SM * sms
    assert (splits - 1) * MIN_SPLIT_TOKENS < length
    # the next one would not
    full = batch * kv_heads * (2 * splits - 1) >= PROGRAMS_PER_SM * sms
    assert full or splits == MAX_SPLITS or (2 * splits - 1) * MIN_SPLIT_TOKENS >= length


def test_typical_steps_on_132_multiprocessors() -> None:
    assert choose_splits(32, 32, 2000, 132) == 1  # full without splits
    assert choose_splits(16, 8, 2000, 132) == 4
    assert choose_splits(16, 4, 300, 132) == 2  # short
    assert choose_splits(1, 8, 2000, 132) == 16
    assert choose_splits(1, 8, 100_000, 132) == MAX_SPLITS
