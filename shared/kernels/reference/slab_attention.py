"""Decode attention over contiguous slabs: the CPU's path, and a naive twin at the same time."""

from __future__ import annotations

import torch


def slab_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """One new token of one sequence over KV heads that keep the same number of tokens.

    Args:
        query: [num_query_heads, head_dim].
        key: [num_kv_heads, length, head_dim].
        value: As `key`.
        scaling: Factor of the logits.

    Returns:
        [num_query_heads, head_dim].
    """
    # the group is the query axis: one read of K and V serves all its heads
    grouped = query.view(1, key.shape[0], -1, query.shape[-1])
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key[None], value[None], scale=scaling)
    return out.view(query.shape)
