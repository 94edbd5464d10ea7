"""Attention by definition, in float64: the full matrix, one head at a time."""

from __future__ import annotations

import numpy as np
import torch


def attention_matrix(query: torch.Tensor, key: torch.Tensor, first_row: int, scaling: float) -> np.ndarray:
    """[num_query_heads, rows, num_keys], causal, rows starting at position `first_row`."""
    num_query_heads, rows, _ = query.shape
    num_kv_heads, num_keys, _ = key.shape
    q, k = query.double().numpy(), key.double().numpy()
    matrix = np.zeros((num_query_heads, rows, num_keys))
    for head in range(num_query_heads):
        kv_head = head // (num_query_heads // num_kv_heads)
        for row in range(rows):
            seen = first_row + row + 1
            logits = k[kv_head, :seen] @ q[head, row] * scaling
            weights = np.exp(logits - logits.max())
            matrix[head, row, :seen] = weights / weights.sum()
    return matrix


def statistics(matrix: np.ndarray, num_kv_heads: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Column sums per KV head over its group, and entries of at least `threshold` times their row's maximum."""
    num_query_heads, _, num_keys = matrix.shape
    columns = matrix.reshape(num_kv_heads, -1, num_keys).sum(axis=1)
    # the comparison itself is not exact for an entry of exactly the threshold
    kept = (matrix > 0) & (matrix >= threshold * matrix.max(axis=-1, keepdims=True) * (1 - 1e-12))
    return columns, kept.reshape(num_query_heads, -1).sum(axis=1)
