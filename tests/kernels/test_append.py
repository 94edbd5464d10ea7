"""Appending a token to block tables: both twins against a loop, the rest of the memory untouched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.kernels.dispatch import REFERENCE, Kernels, kernels_for
from tests.kernels.paged import Paged, expected_attention, make_paged

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# before the new token: none, a block less one, a block exactly, more
LENGTHS = [[0, 15, 16], [1, 62, 100]]


def draw_token(batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(2, batch, heads, head_dim, generator=generator).to(device, dtype)


def append(kernels: Kernels, token: torch.Tensor, paged: Paged, slots: torch.Tensor) -> None:
    key, value = token
    kernels.append_token(
        key, value, paged.key_blocks, paged.value_blocks, paged.block_table, paged.lengths, slots.to(key.device)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "block_size"), [(128, 16), (80, 64), (8, 16)])
@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64], ids=str)
def test_only_the_new_rows_change(head_dim, block_size, dtype, slot_type, kernels, device) -> None:
    paged = make_paged(LENGTHS, head_dim, block_size, dtype, device, room=1).append()
    token = draw_token(2, 3, head_dim, dtype, device)
    slots = [1, 0]
    pools = (paged.key_blocks, paged.value_blocks)
    expected = [pool.clone() for pool in pools]
    for sequence, slot in enumerate(slots):
        for head, position in enumerate(LENGTHS[slot]):
            block = paged.block_table[slot, head, position // block_size]
            for pool, new in zip(expected, token, strict=True):
                pool[block, position % block_size] = new[sequence, head]
    append(kernels, token, paged, torch.tensor(slots, dtype=slot_type))
    for pool, wanted in zip(pools, expected, strict=True):
        torch.testing.assert_close(pool, wanted, atol=0, rtol=0, equal_nan=True)


def test_a_length_of_zero_writes_nothing(kernels: Kernels, device: torch.device) -> None:
    paged = make_paged([[0, 5]], 16, 16, torch.float32, device, room=1)
    before = paged.key_blocks.clone()
    append(kernels, draw_token(1, 2, 16, torch.float32, device), paged, torch.tensor([0]))
    changed = (paged.key_blocks.nan_to_num(9.0) != before.nan_to_num(9.0)).any(dim=-1)
    assert changed.nonzero().tolist() == [[int(paged.block_table[0, 1, 0]), 4]]


def test_of_repeated_slots_one_token_remains_whole(kernels: Kernels, device: torch.device) -> None:
    paged = make_paged([[0]], 32, 16, torch.float32, device, room=1).append()
    token = draw_token(5, 1, 32, torch.float32, device)
    append(kernels, token, paged, torch.zeros(5, dtype=torch.int64))
    block = int(paged.block_table[0, 0, 0])
    for pool, drawn in zip((paged.key_blocks, paged.value_blocks), token, strict=True):
        assert any(torch.equal(pool[block, 0], row) for row in drawn[:, 0])


def test_arguments_may_be_views(kernels: Kernels, device: torch.device) -> None:
    """[batch, 1, heads, dim] seen as [batch, heads, 1, dim], as projections leave it."""
    paged = make_paged(LENGTHS, 16, 16, torch.float32, device, room=1).append()
    twin = Paged(**{**vars(paged), "key_blocks": paged.key_blocks.clone(), "value_blocks": paged.value_blocks.clone()})
    token = draw_token(2, 3, 32, torch.float32, device)[..., :16]
    assert not token.is_contiguous()
    append(kernels, token, paged, torch.tensor([0, 1]))
    append(kernels, token.contiguous(), twin, torch.tensor([0, 1]))
    torch.testing.assert_close(paged.key_blocks, twin.key_blocks, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(paged.value_blocks, twin.value_blocks, atol=0, rtol=0, equal_nan=True)


def test_a_pool_may_have_more_elements_than_32_bits_count(kernels: Kernels, device: torch.device) -> None:
    """The third block begins at element 2 ** 31; the memory between is never touched, so a CPU never provides it."""
    heads, head_dim, block_size, stride = 1, 16, 16, 2**30
    pool = torch.empty(2 * stride + block_size * head_dim, dtype=torch.float16, device=device)
    blocks = pool.as_strided((3, block_size, head_dim), (stride, head_dim, 1))
    place = (
        torch.full((1, heads, 1), 2, dtype=torch.int32, device=device),
        torch.ones(1, heads, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    token = draw_token(1, heads, head_dim, torch.float16, device)[0]
    kernels.append_token(token, token, blocks, blocks, *place)
    assert torch.equal(blocks[2, 0], token[0, 0])
    # attention to a single token is its value
    assert torch.equal(kernels.paged_attention(token, blocks, blocks, *place, 1.0, 1), token)


def test_what_was_appended_is_attended_to(kernels: Kernels, device: torch.device) -> None:
    lengths = [[63, 0], [128, 15]]
    paged = make_paged(lengths, 32, 16, torch.float32, device, room=1).append()
    token, query = draw_token(2, 2, 32, torch.float32, device), draw_token(2, 8, 32, torch.float32, device)[0]
    slots = torch.tensor([0, 1], device=device)
    append(kernels, token, paged, slots)
    out = kernels.paged_attention(
        query, paged.key_blocks, paged.value_blocks, paged.block_table, paged.lengths, slots, 0.3, 2
    )
    for rows, new in ((paged.keys, token[0]), (paged.values, token[1])):
        for slot in range(2):
            rows[slot] = [torch.cat([kept, new[slot, head, None].cpu()]) for head, kept in enumerate(rows[slot])]
    expected = expected_attention(query, paged, [0, 1], 0.3)
    np.testing.assert_allclose(out.cpu().double().numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_replays_steps_of_growing_length(device: torch.device) -> None:
    """Captured once, replayed with other queries and lengths."""
    kernels = kernels_for(device, "triton")
    paged = make_paged([[63, 5], [129, 300]], 128, 16, torch.bfloat16, device, room=4)
    token = draw_token(2, 2, 128, torch.bfloat16, device)
    query = draw_token(2, 8, 128, torch.bfloat16, device)[0]
    place = (paged.key_blocks, paged.value_blocks, paged.block_table, paged.lengths)
    slots = torch.tensor([1, 0], device=device)

    def step() -> torch.Tensor:
        paged.lengths.add_(1)
        kernels.append_token(token[0], token[1], *place, slots)
        return kernels.paged_attention(query, *place, slots, 0.1, 4)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        token.normal_()
        query.normal_()
        graph.replay()
        expected = REFERENCE.paged_attention(query, *place, slots, 0.1, 1)
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
