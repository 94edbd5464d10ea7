"""VL-Cache written down naively: loops over explicit attention matrices, nothing shared with the implementation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

Matrix = np.ndarray  # [num_query_heads, rows, keys]


def observed_rows(visual: list[int], num_tokens: int, max_rows: int = 64) -> list[int]:
    last = max(visual, default=num_tokens - 1)
    rows = [row for row in range(num_tokens) if row > last]
    if not rows:
        rows = [row for row in range(num_tokens) if row >= num_tokens - 50]
    return rows[-max_rows:] if max_rows else rows


def sparsity(attention: Matrix, rows: list[int], threshold: float) -> float:
    """Share of causal entries below the threshold, mean over query heads."""
    shares = []
    for head in attention:
        zeroed = causal = 0
        for row in rows:
            visible = head[row, : row + 1]
            zeroed += sum(1 for entry in visible if entry < threshold * visible.max())
            causal += row + 1
        shares.append(zeroed / causal)
    return sum(shares) / len(shares)


def token_scores(attention: Matrix, rows: list[int], num_kv_heads: int) -> list[list[float]]:
    """Attention received by each key, per KV head."""
    group = attention.shape[0] // num_kv_heads
    return [
        [
            sum(float(attention[kv * group + query, row, key]) for query in range(group) for row in rows if key <= row)
            for key in range(attention.shape[2])
        ]
        for kv in range(num_kv_heads)
    ]


def strict_tokens(sparsities: list[float], retention: Fraction, tokens: int, min_tokens: int) -> list[int]:
    """clip(c * d, low, 1) with the exact mean: c from the breakpoints of a piecewise linear function."""
    densities, layers = [1 - share for share in sparsities], len(sparsities)
    low = min(1.0, max(min(0.01, float(retention)), min_tokens / tokens))
    wanted = max(float(retention), low) * layers

    def total(c: float) -> float:
        return sum(min(1.0, max(low, c * density)) for density in densities)

    points = sorted({0.0, *(low / density for density in densities), *(1 / density for density in densities)})
    c = points[-1]
    for left, right in itertools.pairwise(points):
        if total(left) <= wanted < total(right):
            c = left + (wanted - total(left)) / (total(right) - total(left)) * (right - left)
            break
    shares = [min(1.0, max(low, c * density)) * tokens for density in densities]
    kept = [math.floor(share + 1e-6) for share in shares]
    target = max(math.floor(retention * layers * tokens), layers * min(tokens, min_tokens))
    by_remainder = sorted(range(layers), key=lambda layer: (kept[layer] - shares[layer], layer))
    for layer in by_remainder[: target - sum(kept)]:
        kept[layer] += 1
    return kept


def paper_tokens(sparsities: list[float], retention: Fraction, tokens: int, min_tokens: int) -> list[int]:
    densities = [1 - share for share in sparsities]
    shares = [density / sum(densities) * float(retention) * len(densities) for density in densities]
    return [max(math.floor(min(1.0, max(0.01, share)) * tokens), min(tokens, min_tokens)) for share in shares]


def kept_tokens(scores: list[float], kept: int, recent_tenths: int) -> list[int]:
    """The last `recent_tenths` tenths of `kept`, and the best of the others."""
    recent = recent_tenths * kept // 10
    older = list(range(len(scores) - recent))
    best = sorted(older, key=lambda position: (-scores[position], position))
    return sorted(best[: kept - recent] + list(range(len(scores) - recent, len(scores))))
