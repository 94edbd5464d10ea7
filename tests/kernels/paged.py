"""Ragged KV in a shuffled block table, with memory that nobody may look at, and its attention by definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.kernels.brute_force import attention_matrix

Rows = list[list[torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Paged:
    """One layer's KV: what the kernels get, and the same rows as plain tensors per slot and KV head."""

    key_blocks: torch.Tensor
    value_blocks: torch.Tensor
    block_table: torch.Tensor
    lengths: torch.Tensor
    keys: Rows
    values: Rows

    def append(self) -> Paged:
        """The same memory, one token longer everywhere; its rows do not know the new token."""
        return Paged(**{**vars(self), "lengths": self.lengths + 1})


def make_paged(
    lengths: list[list[int]], head_dim: int, block_size: int, dtype: torch.dtype, device: torch.device, room: int = 0
) -> Paged:
    """Slots x KV heads of the given lengths, with blocks for `room` more tokens.

    Every row that no token has is NaN, and table entries without a block name a block full of them.
    """
    generator = torch.Generator().manual_seed(sum(map(sum, lengths)) + head_dim)
    needed = [[-(-(length + room) // block_size) for length in heads] for heads in lengths]
    num_blocks = sum(map(sum, needed)) + 1
    poison, *free = torch.randperm(num_blocks, generator=generator).tolist()
    table = torch.full((len(lengths), len(lengths[0]), max(map(max, needed)) + 1), poison, dtype=torch.int32)
    blocks = torch.full((2, num_blocks, block_size, head_dim), torch.nan)
    rows: tuple[Rows, Rows] = ([[] for _ in lengths], [[] for _ in lengths])
    for slot, heads in enumerate(lengths):
        for head, length in enumerate(heads):
            own = [free.pop() for _ in range(needed[slot][head])]
            table[slot, head, : len(own)] = torch.tensor(own, dtype=torch.int32)
            for pool, kept in zip(blocks, rows, strict=True):
                drawn = torch.randn(length, head_dim, generator=generator).to(dtype)
                for position, row in enumerate(drawn):
                    pool[own[position // block_size], position % block_size] = row
                kept[slot].append(drawn)
    key_blocks, value_blocks = blocks.to(device, dtype)
    return Paged(
        key_blocks=key_blocks,
        value_blocks=value_blocks,
        block_table=table.to(device),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        keys=rows[0],
        values=rows[1],
    )


def seen_from(paged: Paged, first: list[list[int]]) -> Paged:
    """The same memory, whose plain rows are those from the first that is seen on."""
    keys, values = (
        [[rows[begin:] for rows, begin in zip(*slot, strict=True)] for slot in zip(plain, first, strict=True)]
        for plain in (paged.keys, paged.values)
    )
    return Paged(**{**vars(paged), "keys": keys, "values": values})


def expected_attention(query: torch.Tensor, paged: Paged, slots: list[int], scaling: float) -> np.ndarray:
    """[batch, num_query_heads, head_dim] in float64; zeros for a KV head without tokens."""
    group = query.shape[1] // len(paged.keys[0])
    out = np.zeros(query.shape)
    for sequence, slot in enumerate(slots):
        for head, (key, value) in enumerate(zip(paged.keys[slot], paged.values[slot], strict=True)):
            heads = slice(head * group, (head + 1) * group)
            if len(key) > 0:
                rows = query[sequence, heads, None].cpu()
                matrix = attention_matrix(rows, key[None], len(key) - 1, scaling)[:, 0]
                out[sequence, heads] = matrix @ value.double().numpy()
    return out
