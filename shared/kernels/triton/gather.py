"""Gathering the kept rows of a prompt into a parcel body: one launch for K and V of all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from shared.kernels.gather_arguments import check_gather

# Bytes of K, and again of V, that one program copies: four 16-byte loads of each per thread.
TILE_BYTES = 8 * 1024
MAX_ROWS = 64
# The widest load of a thread.
MAX_ALIGNMENT = 16


def gather_rows(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    indices: torch.Tensor,
    num_kept: Sequence[int],
    out: torch.Tensor,
) -> None:
    """See the reference of the same name. The layers' tensors must live until the launch has run."""
    check_gather(keys, values, indices, num_kept, out)
    most = max(num_kept)
    if most == 0:
        return
    head_dim, token_stride = keys[0].shape[2], keys[0].stride(1)
    plan = _plan(keys, values, num_kept)
    unit = _alignment(plan, token_stride, out) // out.element_size()
    dim_pad = triton.next_power_of_2(head_dim)
    rows = min(MAX_ROWS, max(1, TILE_BYTES // (dim_pad * out.element_size())))
    _gather[(triton.cdiv(most, rows), len(num_kept))](
        plan.to(keys[0].device, non_blocking=True),
        indices,
        out,
        len(num_kept),
        token_stride // unit,
        UNIT=unit,
        ITEM_BYTES=out.element_size(),
        HEAD_DIM=head_dim,
        DIM_PAD=dim_pad,
        ROWS=rows,
    )


def _plan(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], num_kept: Sequence[int]) -> torch.Tensor:
    """Where each (layer, KV head) reads and writes, in the order in which the kernel loads it.

    Returns:
        [6, len(num_kept)] int64 on the CPU: addresses of the head's first K and V row, its first index, its number of
        rows, and the rows of the output where its K and its V begin.
    """
    num_layers, num_kv_heads = len(keys), keys[0].shape[0]
    head_bytes = torch.arange(num_kv_heads) * keys[0].stride(0) * keys[0].element_size()
    key_at = torch.tensor([key.data_ptr() for key in keys])[:, None] + head_bytes
    value_at = torch.tensor([value.data_ptr() for value in values])[:, None] + head_bytes
    count = torch.tensor(num_kept).view(num_layers, num_kv_heads)
    first = (count.flatten().cumsum(0) - count.flatten()).view(num_layers, num_kv_heads)
    # every earlier layer has written as many V rows as K rows
    key_row = first + first[:, :1]
    value_row = key_row + count.sum(dim=1, keepdim=True)
    return torch.stack([key_at, value_at, first, count, key_row, value_row]).flatten(1)


def _alignment(plan: torch.Tensor, token_stride: int, out: torch.Tensor) -> int:
    """Bytes, a power of two, that divide every row's address: the compiler cannot see through loaded addresses."""
    addresses = plan[:2].flatten().tolist()
    return math.gcd(MAX_ALIGNMENT, token_stride * out.element_size(), *addresses)


@triton.jit
def _gather(
    p_plan: tl.tensor,
    p_indices: tl.tensor,
    p_out: tl.tensor,
    num_segments: tl.tensor,
    token_stride: tl.tensor,  # in units
    UNIT: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    p_segment = p_plan + tl.program_id(1)
    count = tl.load(p_segment + 3 * num_segments)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= count:
        return
    item = p_out.dtype.element_ty
    p_key = tl.multiple_of(tl.load(p_segment).to(tl.pointer_type(item)), UNIT * ITEM_BYTES)
    p_value = tl.multiple_of(tl.load(p_segment + num_segments).to(tl.pointer_type(item)), UNIT * ITEM_BYTES)
    first = tl.load(p_segment + 2 * num_segments)
    key_row = tl.load(p_segment + 4 * num_segments)
    value_row = tl.load(p_segment + 5 * num_segments)
    m_row = o_row < count
    token = tl.load(p_indices + first + o_row, mask=m_row, other=0).to(tl.int64)
    o_dim = tl.arange(0, DIM_PAD)
    m_tile = m_row[:, None] & (o_dim < HEAD_DIM)[None, :]
    o_source = (token * token_stride * UNIT)[:, None] + o_dim[None, :]
    o_target = o_row[:, None] * HEAD_DIM + o_dim[None, :]
    key = tl.load(p_key + o_source, mask=m_tile)
    value = tl.load(p_value + o_source, mask=m_tile)
    tl.store(p_out + key_row * HEAD_DIM + o_target, key, mask=m_tile)
    tl.store(p_out + value_row * HEAD_DIM + o_target, value, mask=m_tile)
