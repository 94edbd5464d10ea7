"""Statistics of a prompt's last attention rows, in two sweeps over the keys and without atomics.

Both sweeps have one program per KV head and block of keys. It reads its keys once and lets the rows of all query heads
of the group pass by, tile after tile. The attention matrix stays in registers:

                      block 0       block 1       block 2     (of keys)
    tile 0 of rows | max, sum .. | max, sum .. | max, sum .. |   first sweep; merged along each row
    tile 1         | max, sum .. | max, sum .. | max, sum .. |
    tile 2         | max, sum .. | max, sum .. | max, sum .. |
                        |             |             |
                    column sums and counts                       second sweep, with the rows' normalisers

Every number is written by one program and summed in a fixed order: results do not change from run to run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from shared.kernels.reference.statistics import PostVisionStatistics
from shared.kernels.triton.environment import INTERPRETED

# Bytes of K in a block and of queries in a tile: 64 KiB of shared memory with two tiles on their way.
BLOCK_BYTES = 32 * 1024
TILE_BYTES = 16 * 1024
MAX_BLOCK = 128
# One warp group's product.
MAX_TILE = 64
NUM_WARPS = 4
NUM_STAGES = 2
# Rows of a query head per launch: bounds the partial results, three floats per row and block of keys.
MAX_ROWS = 512
# What one program merges at once.
MERGE_ROWS = 16
MERGE_BLOCKS = 64
# Matters for float32 storage only: three TF32 products come close to fp32, and plain fp32 would spill registers.
FP32_DOT = tl.constexpr("tf32x3")
# tl.dot's smallest M, N and K.
MIN_DOT = 16


def post_vision_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    first_row: int,
    scaling: float,
    threshold: float,
    visual: torch.Tensor | None = None,
) -> PostVisionStatistics:
    """See the reference of the same name."""
    num_query_heads, rows, _ = query.shape
    assert key.shape[1] == first_row + rows, "the observed rows are the last ones"
    assert query.stride(2) == key.stride(2) == 1, "rows are contiguous"
    columns = torch.zeros(key.shape[:2], dtype=torch.float32, device=key.device)
    counts = torch.zeros(num_query_heads, dtype=torch.int64, device=key.device)
    masses = columns.new_empty((2, num_query_heads, rows))
    for start in range(0, rows, MAX_ROWS):
        chunk = slice(start, min(start + MAX_ROWS, rows))
        counts += _observe(
            query[:, chunk], key, first_row + start, scaling, threshold, visual, columns, masses[:, :, chunk]
        )
    if visual is None:
        return PostVisionStatistics(columns, counts, None, None)
    return PostVisionStatistics(columns, counts, masses[0], masses[1])


def _observe(
    query: torch.Tensor,
    key: torch.Tensor,
    first_row: int,
    scaling: float,
    threshold: float,
    visual: torch.Tensor | None,
    columns: torch.Tensor,
    masses: torch.Tensor,
) -> torch.Tensor:
    """Adds the rows' column sums to `columns`, fills their `masses` [2, num_query_heads, rows]; returns the counts."""
    num_query_heads, rows, _ = query.shape
    num_kv_heads, num_keys = key.shape[0], first_row + rows
    shape = _shape(query, key)
    grid = (triton.cdiv(num_keys, shape["BLOCK"]), num_kv_heads)
    tiles = shape["GROUP"] * triton.cdiv(rows, shape["TILE"])
    inputs = (query, key, rows, first_row, scaling * math.log2(math.e), *query.stride()[:2], *key.stride()[:2])
    # maximum, sum and, if asked for, sum over visual keys
    partial = columns.new_empty((2 if visual is None else 3, num_query_heads, grid[0], rows))
    flags = partial if visual is None else visual.view(torch.uint8)
    _sweep_rows[grid](*inputs, flags, partial, partial.stride(0), VISUAL=visual is not None, **shape)
    # maximum and log-sum-exp
    whole = columns.new_empty((2, num_query_heads, rows))
    _merge_blocks[(triton.cdiv(rows, MERGE_ROWS), num_query_heads)](
        partial,
        partial.stride(0),
        grid[0],
        rows,
        whole,
        whole.stride(0),
        masses,
        *masses.stride()[:2],
        VISUAL=visual is not None,
        ROWS=MERGE_ROWS,
        BLOCKS=MERGE_BLOCKS,
    )
    counts = torch.empty((num_kv_heads, grid[0], tiles), dtype=torch.int32, device=key.device)
    _sweep_columns[grid](
        *inputs, whole, whole.stride(0), math.log2(threshold), columns, columns.stride(0), counts, **shape
    )
    return counts.view(num_kv_heads, grid[0], shape["GROUP"], -1).sum(dim=(1, 3)).flatten()


def _shape(query: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
    """The constants that both sweeps are compiled for; the same ones, so that both see the same logits to the bit."""
    num_query_heads, rows, head_dim = query.shape
    dim_pad = max(MIN_DOT, triton.next_power_of_2(head_dim))
    row_bytes = dim_pad * key.element_size()
    return {
        "GROUP": num_query_heads // key.shape[0],
        "HEAD_DIM": head_dim,
        "DIM_PAD": dim_pad,
        "BLOCK": min(MAX_BLOCK, max(MIN_DOT, BLOCK_BYTES // row_bytes)),
        "TILE": max(MIN_DOT, min(MAX_TILE, TILE_BYTES // row_bytes, triton.next_power_of_2(rows))),
        "UPCAST": INTERPRETED,
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
    }


@triton.jit
def _load_keys(
    p_key: tl.tensor,
    o_key: tl.tensor,
    num_keys: tl.tensor,
    key_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """[BLOCK, DIM_PAD], zeros beyond the keys."""
    o_dim = tl.arange(0, DIM_PAD)
    m_key = (o_key < num_keys)[:, None] & (o_dim < HEAD_DIM)[None, :]
    b_key = tl.load(p_key + o_key.to(tl.int64)[:, None] * key_stride + o_dim[None, :], mask=m_key, other=0.0)
    if UPCAST:
        b_key = b_key.to(tl.float32)
    return b_key


@triton.jit
def _logits(
    p_query: tl.tensor,
    b_key: tl.tensor,
    o_row: tl.tensor,
    o_key: tl.tensor,
    last_key: tl.tensor,
    rows: tl.tensor,
    first_row: tl.tensor,
    query_row_stride: tl.tensor,
    log2_scaling: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """[TILE, BLOCK], in powers of two; minus infinity where a key lies after the row, as keys beyond the last do."""
    o_dim = tl.arange(0, DIM_PAD)
    m_query = (o_row < rows)[:, None] & (o_dim < HEAD_DIM)[None, :]
    o_query = o_row.to(tl.int64)[:, None] * query_row_stride + o_dim[None, :]
    b_query = tl.load(p_query + o_query, mask=m_query, other=0.0)  # [TILE, DIM_PAD]
    if UPCAST:
        b_query = b_query.to(tl.float32)
    b_logits = tl.dot(b_query, tl.trans(b_key), input_precision=FP32_DOT) * log2_scaling
    if last_key > first_row:
        b_logits = tl.where(o_key[None, :] <= (first_row + o_row)[:, None], b_logits, float("-inf"))
    return b_logits


@triton.jit
def _sweep_rows(
    p_query: tl.tensor,
    p_key: tl.tensor,
    rows: tl.tensor,
    first_row: tl.tensor,
    log2_scaling: tl.tensor,
    query_stride: tl.tensor,
    query_row_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_stride: tl.tensor,
    p_visual: tl.tensor,
    p_partial: tl.tensor,
    part_stride: tl.tensor,
    VISUAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    num_keys = first_row + rows
    o_key = block * BLOCK + tl.arange(0, BLOCK)
    b_key = _load_keys(p_key + kv_head * key_head_stride, o_key, num_keys, key_stride, HEAD_DIM, DIM_PAD, UPCAST)
    if VISUAL:
        b_visual = tl.load(p_visual + o_key, mask=o_key < num_keys, other=0) != 0
    row_tiles = tl.cdiv(rows, TILE)
    for tile in tl.range(0, GROUP * row_tiles):
        head = kv_head * GROUP + tile // row_tiles
        o_row = tile % row_tiles * TILE + tl.arange(0, TILE)
        b_logits = _logits(
            p_query + head * query_stride,
            b_key,
            o_row,
            o_key,
            block * BLOCK + BLOCK - 1,
            rows,
            first_row,
            query_row_stride,
            log2_scaling,
            HEAD_DIM,
            DIM_PAD,
            UPCAST,
        )
        highest = tl.max(b_logits, 1)
        # the whole block may lie after a row
        b_weights = tl.exp2(b_logits - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
        p_row = p_partial + (head * tl.num_programs(0) + block) * rows + o_row
        tl.store(p_row, highest, mask=o_row < rows)
        tl.store(p_row + part_stride, tl.sum(b_weights, 1), mask=o_row < rows)
        if VISUAL:
            mass = tl.sum(tl.where(b_visual[None, :], b_weights, 0.0), 1)
            tl.store(p_row + 2 * part_stride, mass, mask=o_row < rows)


@triton.jit
def _merge_blocks(
    p_partial: tl.tensor,
    part_stride: tl.tensor,
    num_blocks: tl.tensor,
    rows: tl.tensor,
    p_whole: tl.tensor,
    whole_stride: tl.tensor,
    p_masses: tl.tensor,
    masses_stride: tl.tensor,
    masses_head_stride: tl.tensor,
    VISUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    visual = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, num_blocks, BLOCKS):
        o_block = start + tl.arange(0, BLOCKS)
        m_part = (o_block < num_blocks)[:, None] & m_row[None, :]
        p_part = p_partial + (head * num_blocks + o_block)[:, None] * rows + o_row[None, :]
        b_highest = tl.load(p_part, mask=m_part, other=float("-inf"))  # [BLOCKS, ROWS]
        # finite: every row sees the first key
        new_highest = tl.where(m_row, tl.maximum(highest, tl.max(b_highest, 0)), 0.0)
        b_scale = tl.exp2(b_highest - new_highest[None, :])
        decay = tl.exp2(highest - new_highest)
        b_total = tl.load(p_part + part_stride, mask=m_part, other=0.0)
        total = total * decay + tl.sum(b_total * b_scale, 0)
        if VISUAL:
            b_visual = tl.load(p_part + 2 * part_stride, mask=m_part, other=0.0)
            visual = visual * decay + tl.sum(b_visual * b_scale, 0)
        highest = new_highest
    total = tl.where(m_row, total, 1.0)
    p_row = p_whole + head * rows + o_row
    tl.store(p_row, highest, mask=m_row)
    tl.store(p_row + whole_stride, highest + tl.log2(total), mask=m_row)
    if VISUAL:
        p_mass = p_masses + head * masses_head_stride + o_row
        tl.store(p_mass, visual / total, mask=m_row)
        tl.store(p_mass + masses_stride, (total - visual) / total, mask=m_row)


@triton.jit
def _sweep_columns(
    p_query: tl.tensor,
    p_key: tl.tensor,
    rows: tl.tensor,
    first_row: tl.tensor,
    log2_scaling: tl.tensor,
    query_stride: tl.tensor,
    query_row_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_stride: tl.tensor,
    p_whole: tl.tensor,
    whole_stride: tl.tensor,
    log2_threshold: tl.tensor,
    p_columns: tl.tensor,
    columns_stride: tl.tensor,
    p_counts: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    num_keys = first_row + rows
    o_key = block * BLOCK + tl.arange(0, BLOCK)
    b_key = _load_keys(p_key + kv_head * key_head_stride, o_key, num_keys, key_stride, HEAD_DIM, DIM_PAD, UPCAST)
    row_tiles = tl.cdiv(rows, TILE)
    p_count = p_counts + (kv_head * tl.num_programs(0) + block) * GROUP * row_tiles
    columns = tl.zeros([BLOCK], tl.float32)
    for tile in tl.range(0, GROUP * row_tiles):
        head = kv_head * GROUP + tile // row_tiles
        o_row = tile % row_tiles * TILE + tl.arange(0, TILE)
        b_logits = _logits(
            p_query + head * query_stride,
            b_key,
            o_row,
            o_key,
            block * BLOCK + BLOCK - 1,
            rows,
            first_row,
            query_row_stride,
            log2_scaling,
            HEAD_DIM,
            DIM_PAD,
            UPCAST,
        )
        p_row = p_whole + head * rows + o_row
        # rows that do not exist have neither weight nor count
        highest = tl.load(p_row, mask=o_row < rows, other=float("inf"))
        lse = tl.load(p_row + whole_stride, mask=o_row < rows, other=float("inf"))
        reached = b_logits >= (highest + log2_threshold)[:, None]
        tl.store(p_count + tile, tl.sum(reached.to(tl.int32)))
        columns += tl.sum(tl.exp2(b_logits - lse[:, None]), 0)
    p_column = p_columns + kv_head * columns_stride + o_key
    # earlier rows have been here in earlier launches
    columns += tl.load(p_column, mask=o_key < num_keys, other=0.0)
    tl.store(p_column, columns, mask=o_key < num_keys)
