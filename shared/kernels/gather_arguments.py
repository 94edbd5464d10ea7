"""What every gather of kept rows demands of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_gather(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    indices: torch.Tensor,
    num_kept: Sequence[int],
    out: torch.Tensor,
) -> None:
    """Looks at shapes and strides only, never at the tensors' contents.

    Raises:
        ValueError: They contradict each other; see `gather_rows`.
    """
    if not keys or len(keys) != len(values):
        raise ValueError(f"{len(keys)} layers of keys, {len(values)} of values")
    if len({(tensor.shape, tensor.stride(), tensor.dtype) for tensor in (*keys, *values)}) != 1:
        raise ValueError("the layers differ in shape, strides or dtype")
    num_kv_heads, _, head_dim = keys[0].shape
    if keys[0].stride(2) != 1:
        raise ValueError("the rows are not contiguous")
    if len(num_kept) != len(keys) * num_kv_heads:
        raise ValueError(f"{len(num_kept)} counts for {len(keys)} layers of {num_kv_heads} KV heads")
    total = sum(num_kept)
    if min(num_kept) < 0 or indices.shape != (total,):
        raise ValueError(f"{tuple(indices.shape)} indices for counts that sum to {total}")
    if out.shape != (2 * total, head_dim) or not out.is_contiguous() or out.dtype != keys[0].dtype:
        raise ValueError(f"the output must be a contiguous [{2 * total}, {head_dim}] of {keys[0].dtype}")
