"""Decode attention over contiguous slabs in torch: the truth for the native kernel, and its fallback.

A loop of SDPA over the sequences reads K and V at nearly the speed of memory; padding the batch would lose the
padding's share.
"""

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
        query: [batch, num_query_heads, head_dim], of any floating dtype.
        key: [batch, num_kv_heads, head_dim], of the new token.
        value: As `key`.
        pool: [elements], contiguous, the memory that holds all slabs; written at position lengths - 1 of each.
        key_at: [batch, num_kv_heads] int64, element of the pool where a head's K slab begins.
        value_at: As `key_at`.
        lengths: [batch, num_kv_heads] int64, tokens present, the new one included: at least 1.
        scaling: Factor of the logits.

    Returns:
        [batch, num_query_heads, head_dim], accumulated in fp32, or in fp64 if that is the dtype.
    """
    _write_last_rows(pool, key_at, lengths, key)
    _write_last_rows(pool, value_at, lengths, value)
    # the group is the query axis: one read of K and V serves all its heads
    grouped = query.contiguous().unflatten(1, (key.shape[1], -1))
    attended = []
    places = zip(key_at.tolist(), value_at.tolist(), lengths.tolist(), strict=True)
    for sequence, (keys_at, values_at, present) in enumerate(places):
        for heads in _even_runs(keys_at, values_at, present):
            shape = (1, heads.stop - heads.start, present[heads.start], query.shape[-1])
            keys, values = _slabs(pool, keys_at[heads], shape), _slabs(pool, values_at[heads], shape)
            queries = grouped[sequence : sequence + 1, heads]
            attended.append(torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scaling)[0])
    return torch.cat(attended).view(query.shape)


def _write_last_rows(pool: torch.Tensor, slabs_at: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor) -> None:
    head_dim = rows.shape[-1]
    begins = slabs_at + (lengths - 1) * head_dim
    pool.index_copy_(0, (begins[..., None] + torch.arange(head_dim)).flatten(), rows.flatten())


def _even_runs(keys_at: list[int], values_at: list[int], present: list[int]) -> Iterator[slice]:
    """Neighbouring heads of one length whose slabs lie at one distance from each other."""
    start = 0
    for _, run in groupby(present):
        stop = start + len(list(run))
        gaps = {right - left for at in (keys_at, values_at) for left, right in pairwise(at[start:stop])}
        if len(gaps) <= 1 and min(gaps, default=1) > 0:
            yield slice(start, stop)
        else:
            yield from (slice(head, head + 1) for head in range(start, stop))
        start = stop


def _slabs(pool: torch.Tensor, slabs_at: list[int], shape: tuple[int, int, int, int]) -> torch.Tensor:
    """The slabs of a run of heads as a view, [1, heads, length, head_dim]."""
    head_dim = shape[-1]
    gap = slabs_at[1] - slabs_at[0] if len(slabs_at) > 1 else 0
    return pool.as_strided(shape, (0, gap, head_dim, 1), pool.storage_offset() + slabs_at[0])
