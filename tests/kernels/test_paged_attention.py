"""Decode attention over block tables, both twins against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.kernels.dispatch import Kernels
from shared.kernels.reference.paged_attention import paged_attention
from tests.kernels.paged import Paged, expected_attention, make_paged, seen_from

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SCALING = 0.2
CPU = torch.device("cpu")
# lengths per slot and KV head, GQA group, head dim, block size, splits
CASES = {
    "one token, a block less one, a block, one more": ([[1], [63], [64], [65]], 1, 64, 64, 1),
    "heads of unequal length": ([[129, 100], [1, 300]], 4, 128, 16, 4),
    "nothing kept, a split exactly": ([[0, 63], [128, 256]], 7, 80, 32, 4),
    "nothing kept, no splits": ([[0, 100]], 4, 96, 128, 1),
    "more splits than work": ([[5], [300]], 1, 128, 128, 32),
    "a block larger than a tile": ([[129], [200]], 4, 256, 128, 1),
    "the smallest head dim": ([[63, 129]], 2, 8, 16, 4),
    "a group beyond one product": ([[100]], 20, 64, 32, 1),
}


def draw_query(batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(batch, heads, head_dim, generator=generator).to(device, dtype)


def attend(
    kernels: Kernels, query: torch.Tensor, paged: Paged, slots: list[int], splits: int, scaling: float = SCALING
) -> torch.Tensor:
    numbers = torch.tensor(slots, dtype=torch.int32, device=query.device)
    return kernels.paged_attention(
        query, paged.key_blocks, paged.value_blocks, paged.block_table, paged.lengths, numbers, scaling, splits
    )


def assert_is_attention(
    out: torch.Tensor, query: torch.Tensor, paged: Paged, slots: list[int], scaling: float = SCALING
) -> None:
    tolerance = TOLERANCE[query.dtype]
    expected = expected_attention(query, paged, slots, scaling)
    assert out.shape == query.shape
    assert out.dtype == query.dtype
    np.testing.assert_allclose(out.cpu().double().numpy(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("lengths", "group", "head_dim", "block_size", "splits"), CASES.values(), ids=CASES)
def test_it_is_attention(lengths, group, head_dim, block_size, splits, dtype, kernels, device) -> None:
    paged = make_paged(lengths, head_dim, block_size, dtype, device)
    slots = list(range(len(lengths)))
    query = draw_query(len(slots), group * len(lengths[0]), head_dim, dtype, device)
    assert_is_attention(attend(kernels, query, paged, slots, splits), query, paged, slots)


# length and first token seen, by slot and KV head; splits
WINDOWS = {
    "nothing has left": ([[(40, 0), (129, 0)]], 1),
    "one is left, and none of an empty head": ([[(40, 39), (0, 0)]], 2),
    "within a block, on its edge, in the last": ([[(130, 5), (130, 16)], [(130, 129), (300, 290)]], 1),
    "in splits": ([[(513, 7), (600, 129)], [(513, 400), (300, 1)]], 4),
    "all of a head": ([[(70, 70), (70, 3)]], 2),
}


@pytest.mark.parametrize(("heads", "splits"), WINDOWS.values(), ids=WINDOWS)
def test_what_left_a_window_is_not_seen(heads, splits, kernels: Kernels, device: torch.device) -> None:
    lengths, first = ([[pair[part] for pair in slot] for slot in heads] for part in range(2))
    paged = make_paged(lengths, 64, 16, torch.float32, device)
    slots = list(range(len(lengths)))[::-1]
    query = draw_query(len(slots), 6, 64, torch.float32, device)
    places = (paged.key_blocks, paged.value_blocks, paged.block_table, paged.lengths)
    begin = torch.tensor(first, dtype=torch.int32, device=device)
    out = kernels.paged_attention(query, *places, torch.tensor(slots, device=device), SCALING, splits, begin)
    assert_is_attention(out, query, seen_from(paged, first), slots)


def test_slots_may_come_in_any_order_and_repeat(kernels: Kernels, device: torch.device) -> None:
    paged = make_paged([[1], [70], [3]], 64, 16, torch.float32, device)
    slots = [1, 0, 0, 1]
    query = draw_query(4, 4, 64, torch.float32, device)
    for dtype in (torch.int32, torch.int64):
        numbers = torch.tensor(slots, dtype=dtype, device=device)
        out = kernels.paged_attention(
            query, paged.key_blocks, paged.value_blocks, paged.block_table, paged.lengths, numbers, SCALING, 2
        )
        assert_is_attention(out, query, paged, slots)


def test_arguments_may_be_views(kernels: Kernels, device: torch.device) -> None:
    """K and V of one pool, one layer of a table, queries as projections leave them."""
    paged = make_paged([[40, 130], [129, 7]], 32, 16, torch.float32, device)
    pool = torch.stack([paged.key_blocks, paged.value_blocks], dim=1)
    table, lengths = (
        torch.stack([torch.full_like(tensor, 10**6), tensor], dim=1) for tensor in (paged.block_table, paged.lengths)
    )
    views = Paged(
        key_blocks=pool[:, 0],
        value_blocks=pool[:, 1],
        block_table=table[:, 1],
        lengths=lengths[:, 1],
        keys=paged.keys,
        values=paged.values,
    )
    query = draw_query(2, 12, 32, torch.float32, device)[:, ::3]
    assert not query.is_contiguous()
    assert not views.key_blocks.is_contiguous()
    out = attend(kernels, query, views, [0, 1], 2)
    assert out.is_contiguous()
    assert_is_attention(out, query, paged, [0, 1])


def test_large_logits_do_not_overflow(kernels: Kernels, device: torch.device) -> None:
    paged = make_paged([[300]], 64, 16, torch.float32, device)
    query = draw_query(1, 2, 64, torch.float32, device)
    for splits in (1, 4):
        assert_is_attention(attend(kernels, query, paged, [0], splits, 100.0), query, paged, [0], 100.0)


def test_splits_change_rounding_only(kernels: Kernels, device: torch.device) -> None:
    paged = make_paged([[513]], 128, 64, torch.float32, device)
    query = draw_query(1, 4, 128, torch.float32, device)
    whole, *split = (attend(kernels, query, paged, [0], splits) for splits in (1, 2, 3, 5))
    for out in split:
        torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)


@given(
    lengths=st.lists(st.lists(st.integers(0, 40), min_size=2, max_size=2), min_size=1, max_size=3),
    group=st.integers(1, 4),
    block_size=st.sampled_from([1, 3, 16]),
    data=st.data(),
)
def test_the_reference_is_sdpa_on_gathered_rows(lengths, group, block_size, data) -> None:
    paged = make_paged(lengths, 8, block_size, torch.float32, CPU)
    slots = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=4))
    query = draw_query(len(slots), 2 * group, 8, torch.float32, CPU)
    blocks = (paged.key_blocks, paged.value_blocks, paged.block_table, paged.lengths)
    out = paged_attention(query, *blocks, torch.tensor(slots), SCALING, 1)
    for sequence, slot in enumerate(slots):
        for head, (key, value) in enumerate(zip(paged.keys[slot], paged.values[slot], strict=True)):
            heads = slice(head * group, (head + 1) * group)
            expected = torch.zeros(group, 8)
            if len(key) > 0:
                expected = torch.nn.functional.scaled_dot_product_attention(
                    query[sequence, heads], key, value, scale=SCALING
                )
            torch.testing.assert_close(out[sequence, heads], expected, atol=1e-5, rtol=1e-5)
