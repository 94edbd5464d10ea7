"""Decode attention over a block table, ragged per sequence and KV head.

One program reads K and V of one (sequence, KV head, split) once, for all query heads of the group together: they are
the M axis of its products. With more than one split, partial results go through memory and a second launch merges
them by their log-sum-exp. Launches depend on shapes alone, never on device data, so a CUDA graph can capture them.

    tokens of a KV head    |0, or first seen ........... length|
    splits, in whole tiles | split 0   | split 1   | split 2   |   (split 3 is empty: it returns at once)
    tiles                  |   |   |   |   |   |   |   |   |  ~|
    blocks of the table    |     |     |     |     |     |    ~|
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from shared.kernels.splits import MIN_SPLIT_TOKENS
from shared.kernels.triton.environment import INTERPRETED

# Bytes of K, and again of V, in a tile. With three stages two tiles are on their way while one is used: 64 KiB per
# program, and three programs fit into the shared memory of an H200's multiprocessor. By Little's law its share of the
# memory's bandwidth needs some 30 KiB on their way (4.8 TB/s x 0.8 us / 132).
TILE_BYTES = 16 * 1024
NUM_WARPS = 4
NUM_STAGES = 3
# Matters for float32 storage only: three TF32 products come close to fp32, and plain fp32 would spill registers.
FP32_DOT = tl.constexpr("tf32x3")
# tl.dot's smallest M, N and K.
MIN_DOT = 16


def paged_attention(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    scaling: float,
    num_splits: int,
    first: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the reference of the same name; `choose_splits` gives a good `num_splits`.

    The first call with new shapes compiles: make it before a CUDA graph is captured.
    """
    assert query.stride(2) == block_table.stride(2) == lengths.stride(1) == 1, "rows are contiguous"
    assert first is None or first.stride() == lengths.stride(), "both are found by the same steps"
    assert key_blocks.stride()[1:] == value_blocks.stride()[1:] == (query.shape[2], 1), "blocks are contiguous"
    shape = _shape(query, key_blocks, block_table.shape[1], num_splits, windowed=first is not None)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # where nothing has left a window nothing reads it
    first = lengths if first is None else first
    arguments = (query, key_blocks, value_blocks, block_table, lengths, first, slots)
    if num_splits == 1:
        # the one split writes the result itself
        _launch_splits(*arguments, scaling, out, out, shape)
        return out
    batch, num_query_heads, head_dim = query.shape
    partial = out.new_empty((batch, num_query_heads, num_splits, head_dim), dtype=torch.float32)
    lse = out.new_empty((batch, num_query_heads, num_splits), dtype=torch.float32)
    _launch_splits(*arguments, scaling, partial, lse, shape)
    _merge_splits[(num_query_heads, batch)](
        partial,
        lse,
        lengths,
        first,
        slots,
        out,
        lengths.stride(0),
        SPLITS_PAD=triton.next_power_of_2(num_splits),
        **shape,
    )
    return out


def _shape(
    query: torch.Tensor, blocks: torch.Tensor, num_kv_heads: int, num_splits: int, *, windowed: bool
) -> dict[str, int]:
    """The constants that both kernels are compiled for."""
    head_dim = query.shape[2]
    dim_pad = max(MIN_DOT, triton.next_power_of_2(head_dim))
    tile = TILE_BYTES // (dim_pad * blocks.element_size())
    return {
        "GROUP": query.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "DIM_PAD": dim_pad,
        "TILE": min(MIN_SPLIT_TOKENS, max(MIN_DOT, tile)),
        "NUM_SPLITS": num_splits,
        "WINDOWED": windowed,
        "MIN_SPLIT": MIN_SPLIT_TOKENS,
    }


def _launch_splits(
    query: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    first: torch.Tensor,
    slots: torch.Tensor,
    scaling: float,
    partial: torch.Tensor,
    lse: torch.Tensor,
    shape: dict[str, int],
) -> None:
    """Fills `partial` [batch, num_query_heads, num_splits, head_dim] and, with several splits, its `lse`."""
    _attend_split[(shape["NUM_SPLITS"], block_table.shape[1], query.shape[0])](
        query,
        key_blocks,
        value_blocks,
        block_table,
        lengths,
        first,
        slots,
        partial,
        lse,
        scaling * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        key_blocks.stride(0),
        value_blocks.stride(0),
        block_table.stride(0),
        block_table.stride(1),
        lengths.stride(0),
        GROUP_PAD=max(MIN_DOT, triton.next_power_of_2(shape["GROUP"])),
        BLOCK_SIZE=key_blocks.shape[1],
        UPCAST=INTERPRETED,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        **shape,
    )


@triton.jit
def _split_tokens(
    length: tl.tensor, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr
) -> tl.tensor:
    """Tokens of every split but the last: whole tiles, so that short sequences leave splits empty."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, NUM_SPLITS), TILE) * TILE, MIN_SPLIT)


@triton.jit
def _attend_split(
    p_query: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_table: tl.tensor,
    p_lengths: tl.tensor,
    p_first: tl.tensor,
    p_slots: tl.tensor,
    p_partial: tl.tensor,
    p_lse: tl.tensor,
    log2_scaling: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    table_stride: tl.tensor,
    table_head_stride: tl.tensor,
    lengths_stride: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    slot = tl.load(p_slots + sequence).to(tl.int64)
    length = tl.load(p_lengths + slot * lengths_stride + head)
    begin = tl.load(p_first + slot * lengths_stride + head) if WINDOWED else 0
    split_tokens = _split_tokens(length - begin, TILE, NUM_SPLITS, MIN_SPLIT)
    start = begin + split * split_tokens
    end = tl.minimum(start + split_tokens, length)
    if NUM_SPLITS > 1 and start >= end:
        return

    o_group = tl.arange(0, GROUP_PAD)
    o_dim = tl.arange(0, DIM_PAD)
    m_group = o_group < GROUP
    m_dim = o_dim < HEAD_DIM
    m_query = m_group[:, None] & m_dim[None, :]
    o_head = head * GROUP + o_group
    o_query = sequence.to(tl.int64) * query_stride + o_head[:, None] * query_head_stride + o_dim[None, :]
    b_query = tl.load(p_query + o_query, mask=m_query, other=0.0)  # [GROUP_PAD, DIM_PAD]
    if UPCAST:
        b_query = b_query.to(tl.float32)

    highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    b_out = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    p_row = p_table + slot * table_stride + head * table_head_stride
    o_token = start + tl.arange(0, TILE)
    # One tile ahead: a load whose address comes from a load of the same round would cost a pipeline stage.
    block = tl.load(p_row + o_token // BLOCK_SIZE, mask=o_token < end, other=0)
    for _ in tl.range(start, end, TILE):
        m_token = o_token < end
        o_row = o_token % BLOCK_SIZE * HEAD_DIM
        m_tile = m_token[:, None] & m_dim[None, :]
        o_key = (block.to(tl.int64) * key_stride + o_row)[:, None] + o_dim[None, :]
        o_value = (block.to(tl.int64) * value_stride + o_row)[:, None] + o_dim[None, :]
        o_token += TILE
        block = tl.load(p_row + o_token // BLOCK_SIZE, mask=o_token < end, other=0)

        b_key = tl.load(p_keys + o_key, mask=m_tile, other=0.0)  # [TILE, DIM_PAD]
        if UPCAST:
            b_key = b_key.to(tl.float32)
        b_logits = tl.dot(b_query, tl.trans(b_key), input_precision=FP32_DOT) * log2_scaling
        b_logits = tl.where(m_token[None, :], b_logits, float("-inf"))  # [GROUP_PAD, TILE]
        new_highest = tl.maximum(highest, tl.max(b_logits, 1))
        b_weights = tl.exp2(b_logits - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(b_weights, 1)
        highest = new_highest

        b_value = tl.load(p_values + o_value, mask=m_tile, other=0.0)  # [TILE, DIM_PAD]
        if UPCAST:
            b_value = b_value.to(tl.float32)
        b_out = tl.dot(b_weights.to(b_value.dtype), b_value, b_out * decay[:, None], input_precision=FP32_DOT)

    # no token at all: zeros
    b_out = b_out / tl.where(total > 0, total, 1.0)[:, None]
    o_partial = (sequence.to(tl.int64) * tl.num_programs(1) * GROUP + o_head) * NUM_SPLITS + split
    b_out = b_out.to(p_partial.dtype.element_ty)
    tl.store(p_partial + o_partial[:, None] * HEAD_DIM + o_dim[None, :], b_out, mask=m_query)
    if NUM_SPLITS > 1:
        tl.store(p_lse + o_partial, highest + tl.log2(total), mask=m_group)


@triton.jit
def _merge_splits(
    p_partial: tl.tensor,
    p_lse: tl.tensor,
    p_lengths: tl.tensor,
    p_first: tl.tensor,
    p_slots: tl.tensor,
    p_out: tl.tensor,
    lengths_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    slot = tl.load(p_slots + sequence).to(tl.int64)
    length = tl.load(p_lengths + slot * lengths_stride + head // GROUP)
    if WINDOWED:
        length -= tl.load(p_first + slot * lengths_stride + head // GROUP)
    o_split = tl.arange(0, SPLITS_PAD)
    # splits beyond the sequence have written nothing
    m_split = o_split * _split_tokens(length, TILE, NUM_SPLITS, MIN_SPLIT) < length
    o_dim = tl.arange(0, DIM_PAD)
    m_dim = o_dim < HEAD_DIM
    o_row = sequence.to(tl.int64) * tl.num_programs(0) + head
    lse = tl.load(p_lse + o_row * NUM_SPLITS + o_split, mask=m_split, other=float("-inf"))
    weights = tl.exp2(lse - tl.where(length > 0, tl.max(lse, 0), 0.0))
    total = tl.sum(weights, 0)
    o_partial = (o_row * NUM_SPLITS + o_split)[:, None] * HEAD_DIM + o_dim[None, :]
    b_partial = tl.load(p_partial + o_partial, mask=m_split[:, None] & m_dim[None, :], other=0.0)
    # no token at all: zeros
    out = tl.sum(b_partial * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(p_out + o_row * HEAD_DIM + o_dim, out.to(p_out.dtype.element_ty), mask=m_dim)
