"""Post-vision statistics, the naive way: it defines the truth that the kernel of the same signature is tested against."""

from __future__ import annotations

import math

import torch

# Rows handled at once: bounds the logits in memory to num_query_heads x 64 x num_keys values.
ROW_BLOCK = 64


def post_vision_statistics(
    query: torch.Tensor, key: torch.Tensor, first_row: int, scaling: float, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column sums of the attention rows at the end of a prompt, and how many of their entries matter.

    The full attention matrix is never built: only the observed rows are recomputed. An entry counts when
    A >= threshold * rowmax(A), tested on the logits (S >= rowmax(S) + ln threshold), so no softmax is needed for it.

    Args:
        query: [num_query_heads, rows, head_dim], the rows at positions first_row .. first_row + rows - 1.
        key: [num_kv_heads, num_keys, head_dim], num_keys = first_row + rows.
        first_row: Position of the first observed row.
        scaling: Factor of the logits.
        threshold: In (0, 1]; VL-Cache's p.

    Returns:
        Column sums per KV head, summed over the query heads of its group, [num_kv_heads, num_keys] fp32; and
        counted entries per query head, [num_query_heads] int64.
    """
    num_query_heads, rows, head_dim = query.shape
    num_kv_heads, num_keys, _ = key.shape
    assert num_keys == first_row + rows, "the observed rows are the last ones"
    grouped = query.float().view(num_kv_heads, num_query_heads // num_kv_heads, rows, head_dim)
    transposed = key.float().transpose(1, 2)
    columns = torch.zeros(num_kv_heads, num_keys, device=key.device)
    counts = torch.zeros(num_query_heads, dtype=torch.int64, device=key.device)
    for start in range(0, rows, ROW_BLOCK):
        block = grouped[:, :, start : start + ROW_BLOCK]
        logits = _causal_logits(block, transposed, first_row + start, scaling)
        highest = logits.amax(dim=-1, keepdim=True)
        counts += (logits >= highest + math.log(threshold)).sum(dim=(-2, -1)).flatten()
        columns += torch.softmax(logits, dim=-1).sum(dim=(1, 2))
    return columns, counts


def _causal_logits(query: torch.Tensor, transposed_key: torch.Tensor, first_row: int, scaling: float) -> torch.Tensor:
    """[num_kv_heads, group, rows, num_keys], minus infinity where the key lies after the row."""
    logits = torch.matmul(query, transposed_key[:, None]) * scaling
    rows = torch.arange(first_row, first_row + query.shape[2], device=query.device)
    keys = torch.arange(transposed_key.shape[2], device=query.device)
    return logits.masked_fill(keys > rows[:, None], -torch.inf)
