"""Decode attention over slabs by a small C kernel that takes a whole batch at once; see its reference twin."""

from __future__ import annotations

import torch

from shared.kernels.native.library import gomp_parallel, slab_attention_function
from shared.kernels.reference import slab_attention as reference
from shared.kernels.reference.slab_attention import SharedSlabs

MAX_HEAD_DIM = 256


def available() -> bool:
    """Whether the kernel was built for this machine; calls run on torch otherwise."""
    return slab_attention_function() is not None


def slab_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pool: torch.Tensor,
    key_at: torch.Tensor,
    value_at: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    shared: SharedSlabs | None = None,
) -> torch.Tensor:
    """See `reference.slab_attention`, which serves what the kernel does not: other dtypes and odd head sizes.

    Runs on torch's threads, as many as `torch.get_num_threads()`; the result does not depend on their number.
    """
    function = slab_attention_function()
    if function is None or not _suits(query):
        return reference.slab_attention(query, key, value, pool, key_at, value_at, lengths, scaling, shared)
    assert pool.dtype == key.dtype == value.dtype == query.dtype
    assert pool.dim() == 1
    assert pool.is_contiguous()
    assert lengths.shape == key.shape[:2]
    # named, so that copies live until the kernel has read them
    inputs = [tensor.contiguous() for tensor in (query, key, value)]
    places = [tensor.contiguous() for tensor in (key_at, value_at, lengths, *(shared or ()))]
    assert all(tensor.dtype == torch.int64 and tensor.shape == lengths.shape for tensor in places)
    nobody_s = () if shared else (None, None, None)
    out = torch.empty_like(inputs[0])
    rows, head_dim = key_at.numel(), query.shape[-1]
    function(
        *(tensor.data_ptr() for tensor in (*inputs, out, pool, *places)),
        *nobody_s,
        rows,
        query.shape[1] // key.shape[1],
        head_dim,
        scaling,
        query.dtype == torch.bfloat16,
        gomp_parallel(),
        min(torch.get_num_threads(), rows),
    )
    return out


def _suits(query: torch.Tensor) -> bool:
    head_dim = query.shape[-1]
    served = query.is_cpu and query.dtype in (torch.bfloat16, torch.float32)
    return served and head_dim % 16 == 0 and head_dim <= MAX_HEAD_DIM
