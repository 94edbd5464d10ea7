"""Decode attention over contiguous slabs in torch: the truth for the native kernel, and its fallback.

A loop of SDPA over the sequences reads K and V at nearly the speed of memory; padding the batch would lose the
padding's share.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import torch


class SharedSlabs(NamedTuple):
    """Rows that several sequences read, each before its own. Nobody writes to them.

    Attributes:
        key_at: [batch, num_kv_heads] int64, element of the pool where the K of a head's shared rows begins.
        value_at: As `key_at`.
        lengths: As `key_at`, how many they are; 0 where a sequence shares nothing.
    """

    key_at: torch.Tensor
    value_at: torch.Tensor
    lengths: torch.Tensor


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
    """Appends one new token to every sequence of a ragged batch, then attends.

    Args:
        query: [batch, num_query_heads, head_dim], of any floating dtype.
        key: [batch, num_kv_heads, head_dim], of the new token.
        value: As `key`.
        pool: [elements], contiguous, the memory that holds all slabs; written at the last row of each.
        key_at: [batch, num_kv_heads] int64, element of the pool where a head's K slab begins.
        value_at: As `key_at`.
        lengths: [batch, num_kv_heads] int64, tokens present, the new one and shared ones included.
        scaling: Factor of the logits.
        shared: The first tokens of each head, where they are not in its slab; the new one never is among them.

    Returns:
        [batch, num_query_heads, head_dim], accumulated in fp32, or in fp64 if that is the dtype.
    """
    own = lengths if shared is None else lengths - shared.lengths
    _write_last_rows(pool, key_at, own, key)
    _write_last_rows(pool, value_at, own, value)
    if shared is not None:
        pool, key_at, value_at = _in_one_piece(pool, (key_at, value_at), own, shared, query.shape[-1])
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


def _in_one_piece(
    pool: torch.Tensor,
    own_at: tuple[torch.Tensor, torch.Tensor],
    own: torch.Tensor,
    shared: SharedSlabs,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A copy in which each head's shared rows and its own lie behind each other, and where its slabs begin there."""
    pieces: list[torch.Tensor] = []
    begins, end = [], 0
    for shared_at, at in zip((shared.key_at, shared.value_at), own_at, strict=True):
        begins.append(torch.empty_like(at))
        places = zip(shared_at.flatten().tolist(), shared.lengths.flatten().tolist(), strict=True)
        own_places = zip(at.flatten().tolist(), own.flatten().tolist(), strict=True)
        for number, both in enumerate(zip(places, own_places, strict=True)):
            begins[-1].view(-1)[number] = end
            pieces += [pool[begin : begin + rows * head_dim] for begin, rows in both]
            end += sum(rows for _, rows in both) * head_dim
    return torch.cat(pieces), begins[0], begins[1]


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
