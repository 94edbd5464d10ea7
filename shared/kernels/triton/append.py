"""Appending one token's KV to a block table: one program per (sequence, KV head) writes K and V."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def append_token(
    key: torch.Tensor,
    value: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """See the reference of the same name. One launch that a CUDA graph can capture."""
    batch, num_kv_heads, head_dim = key.shape
    assert key.stride(2) == value.stride(2) == block_table.stride(2) == lengths.stride(1) == 1, "rows are contiguous"
    assert key_blocks.stride()[1:] == value_blocks.stride()[1:] == (head_dim, 1), "blocks are contiguous"
    _append[(num_kv_heads, batch)](
        key,
        value,
        key_blocks,
        value_blocks,
        block_table,
        lengths,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_blocks.stride(0),
        value_blocks.stride(0),
        block_table.stride(0),
        block_table.stride(1),
        lengths.stride(0),
        HEAD_DIM=head_dim,
        DIM_PAD=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=key_blocks.shape[1],
        num_warps=1,
    )


@triton.jit
def _append(
    p_key: tl.tensor,
    p_value: tl.tensor,
    p_key_blocks: tl.tensor,
    p_value_blocks: tl.tensor,
    p_table: tl.tensor,
    p_lengths: tl.tensor,
    p_slots: tl.tensor,
    key_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_stride: tl.tensor,
    value_head_stride: tl.tensor,
    key_block_stride: tl.tensor,
    value_block_stride: tl.tensor,
    table_stride: tl.tensor,
    table_head_stride: tl.tensor,
    lengths_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    slot = tl.load(p_slots + sequence).to(tl.int64)
    length = tl.load(p_lengths + slot * lengths_stride + head)
    if length <= 0:
        return
    position = length - 1
    o_block = slot * table_stride + head * table_head_stride + position // BLOCK_SIZE
    block = tl.load(p_table + o_block).to(tl.int64)
    o_dim = tl.arange(0, DIM_PAD)
    m_dim = o_dim < HEAD_DIM
    o_row = position % BLOCK_SIZE * HEAD_DIM + o_dim
    key = tl.load(p_key + sequence * key_stride + head * key_head_stride + o_dim, mask=m_dim)
    value = tl.load(p_value + sequence * value_stride + head * value_head_stride + o_dim, mask=m_dim)
    tl.store(p_key_blocks + block * key_block_stride + o_row, key, mask=m_dim)
    tl.store(p_value_blocks + block * value_block_stride + o_row, value, mask=m_dim)
