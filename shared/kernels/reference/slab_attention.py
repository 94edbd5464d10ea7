"""Decode attention over contiguous slabs in torch: the truth for the native kernel, and its fallback."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch


def slab_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pool: torch.Tensor,
    key_at: torch.Tensor,
    value_at: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Appends one new token to every sequence of a ragged batch, then attends.

    Args:
        query: [batch, num_query_heads, head_dim].
        key: [batch, num_kv_heads, head_dim], of the new token.
        value: As `key`.
        pool: [elements], the memory that holds all slabs.
        key_at: [batch, num_kv_heads] int64, element of the pool where a head's K slab begins.
        value_at: As `key_at`.
        lengths: [batch, num_kv_heads] int64, tokens present, the new one included.
        scaling: Factor of the logits.

    Returns:
        [batch, num_query_heads, head_dim].
    """
    head_dim = query.shape[-1]
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    for row, (keys_at, values_at, counts) in enumerate(
        zip(key_at.tolist(), value_at.tolist(), lengths.tolist(), strict=True)
    ):
        for first, last in _even_runs(keys_at, values_at, counts):
            heads, length = last - first, counts[first]
            stride = keys_at[first + 1] - keys_at[first] if heads > 1 else length * head_dim
            shape, strides = (1, heads, length, head_dim), (0, stride, head_dim, 1)
            keys = pool.as_strided(shape, strides, keys_at[first])
            values = pool.as_strided(shape, strides, values_at[first])
            keys[0, :, -1], values[0, :, -1] = key[row, first:last], value[row, first:last]
            # the group is the query axis: one read of K and V serves all its heads
            grouped = query[row, first * group : last * group].reshape(1, heads, group, head_dim)
            attended = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
            out[row, first * group : last * group] = attended.view(-1, head_dim)
    return out


def _even_runs(keys_at: list[int], values_at: list[int], counts: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring heads of one length whose slabs lie at even distances, as [first, last)."""
    first = 0
    for _, run in groupby(counts):
        last = first + len(list(run))
        gaps = {
            right - left for at in (keys_at, values_at) for left, right in pairwise(at[first:last])
        }
        if len(gaps) <= 1:
            yield first, last
        else:
            yield from ((head, head + 1) for head in range(first, last))
        first = last
