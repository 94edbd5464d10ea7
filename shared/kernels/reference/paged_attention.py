"""Decode attention over a block table, the naive way: it defines the truth that its Triton twin is tested against."""

from __future__ import annotations

import torch


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
    """One new token per sequence over the tokens of one layer, whose number differs per sequence and KV head.

    Args:
        query: [batch, num_query_heads, head_dim].
        key_blocks: [num_blocks, block_size, head_dim]; a block holds rows of one KV head of one layer.
        value_blocks: As `key_blocks`.
        block_table: [num_slots, num_kv_heads, max_blocks] int32; entries beyond a length are never read.
        lengths: [num_slots, num_kv_heads] int32, tokens present, the new one included; none seen gives zeros.
        slots: [batch] int32 or int64, each sequence's row of table and lengths; rows may repeat.
        scaling: Factor of the logits.
        num_splits: Programs per KV head; without effect here.
        first: As `lengths`, the first token that is seen, those before it having left a window; None sees all.

    Returns:
        [batch, num_query_heads, head_dim] in the query's dtype, accumulated in fp32.
    """
    batch, num_query_heads, head_dim = query.shape
    num_kv_heads = block_table.shape[1]
    grouped = query.float().view(batch, num_kv_heads, num_query_heads // num_kv_heads, head_dim)
    out = torch.zeros_like(grouped)
    for sequence, slot in enumerate(slots.tolist()):
        for head, length in enumerate(lengths[slot].tolist()):
            begin = 0 if first is None else int(first[slot, head])
            key = _rows(key_blocks, block_table[slot, head], length)[begin:]
            value = _rows(value_blocks, block_table[slot, head], length)[begin:]
            if length > begin:
                logits = grouped[sequence, head] @ key.T * scaling
                out[sequence, head] = torch.softmax(logits, dim=-1) @ value
    return out.view(query.shape).to(query.dtype)


def _rows(blocks: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` rows that a table names, [length, head_dim] fp32."""
    num_blocks = -(-length // blocks.shape[1])
    return blocks[table[:num_blocks].long()].flatten(0, 1)[:length].float()
