"""Appending one token's KV to a block table, the naive way."""

from __future__ import annotations

import torch


def append_token(
    key: torch.Tensor,
    value: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Writes the new token of each sequence at position lengths[slot, head] - 1; the lengths already count it.

    Args:
        key: [batch, num_kv_heads, head_dim].
        value: As `key`.
        key_blocks: [num_blocks, block_size, head_dim], written.
        value_blocks: As `key_blocks`.
        block_table: [num_slots, num_kv_heads, max_blocks] int32.
        lengths: [num_slots, num_kv_heads] int32; where it is 0 nothing is written.
        slots: [batch] int32 or int64. Where a slot repeats, any of its tokens may remain.
    """
    block_size = key_blocks.shape[1]
    for sequence, slot in enumerate(slots.tolist()):
        for head, length in enumerate(lengths[slot].tolist()):
            if length > 0:
                block, row = divmod(length - 1, block_size)
                key_blocks[block_table[slot, head, block], row] = key[sequence, head]
                value_blocks[block_table[slot, head, block], row] = value[sequence, head]
