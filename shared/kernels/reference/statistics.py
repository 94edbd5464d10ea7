"""Post-vision statistics in plain torch: the CPU's path, and the twin of the Triton kernel of the same signature.

One KV head and at most `ROW_BLOCK` attention rows at a time, always in the same memory: what the product writes, the
sums find in the core's cache. On a CPU that gains more than large products would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Attention rows handled at once: a megabyte of logits with 2,000 keys.
ROW_BLOCK = 128
# Logits this far below the row's maximum are as good as minus infinity: exp() of less is a denormal or underflows,
# which takes a CPU a hundred times longer, and beside the maximum's 1 it would be lost in rounding anyway.
FAINTEST_LOGIT = -60.0
FAINTEST_WEIGHT = 1e-26  # a little more than its exponential


class PostVisionStatistics(NamedTuple):
    """What the observed rows say about the keys.

    Attributes:
        column_sums: [num_kv_heads, num_keys] fp32, attention per key, summed over rows and the group's query heads.
        counts: [num_query_heads] int64, entries of at least `threshold` times their row's maximum.
        visual_mass: [num_query_heads, rows] fp32, attention of each row on visual keys; None unless asked for.
        text_mass: The same on all other keys.
    """

    column_sums: torch.Tensor
    counts: torch.Tensor
    visual_mass: torch.Tensor | None
    text_mass: torch.Tensor | None


class _Block(NamedTuple):
    """Attention rows of one KV head that are handled at once.

    Attributes:
        rows: Of the group's rows, query head after query head.
        logits: [rows, keys up to the last row], shared with all other blocks.
        corner: View of its last columns, the only ones where a key may lie after a row.
        future: [rows, columns of the corner], minus infinity there, else 0.
    """

    rows: slice
    logits: torch.Tensor
    corner: torch.Tensor
    future: torch.Tensor


def post_vision_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    first_row: int,
    scaling: float,
    threshold: float,
    visual: torch.Tensor | None = None,
) -> PostVisionStatistics:
    """Column sums of the attention rows at the end of a prompt, and how many of their entries matter.

    The full attention matrix is never built: only the observed rows are recomputed. An entry counts when
    exp(S - rowmax(S)) >= threshold, for which no row need be normalised. All sums are in fp32.

    Args:
        query: [num_query_heads, rows, head_dim], the rows at positions first_row .. first_row + rows - 1.
        key: [num_kv_heads, num_keys, head_dim], num_keys = first_row + rows.
        first_row: Position of the first observed row.
        scaling: Factor of the logits.
        threshold: In (0, 1]; VL-Cache's p.
        visual: [num_keys] bool, which keys are visual tokens; asks for the masses.
    """
    num_query_heads, rows, head_dim = query.shape
    num_kv_heads, num_keys, _ = key.shape
    assert num_keys == first_row + rows, "the observed rows are the last ones"
    queries = query.float().reshape(num_kv_heads, -1, head_dim)
    columns = queries.new_zeros(num_kv_heads, num_keys)
    counts = queries.new_empty(queries.shape[:2])
    parts = None if visual is None else torch.stack([visual, ~visual], dim=1).float()
    masses = queries.new_empty(*counts.shape, 2)
    blocks = _blocks(num_query_heads // num_kv_heads, rows, first_row, queries)
    keys = queries.new_empty(num_keys, head_dim)
    for head in range(num_kv_heads):
        keys.copy_(key[head])
        for block in blocks:
            here, seen = (head, block.rows), slice(block.logits.shape[1])
            weights = _weights(block, queries[here], keys[seen], scaling)
            normaliser = weights.sum(dim=1).reciprocal_()
            columns[head, seen].addmv_(weights.T, normaliser)
            if parts is not None:
                masses[here] = weights @ parts[seen] * normaliser[:, None]
            # in place and as floats: comparing into booleans and summing those takes a CPU five times longer
            torch.sum(weights.ge_(max(threshold, FAINTEST_WEIGHT)), dim=1, out=counts[here])
    counts = counts.view(num_query_heads, rows).long().sum(dim=1)
    if parts is None:
        return PostVisionStatistics(columns, counts, None, None)
    return PostVisionStatistics(columns, counts, *masses.view(num_query_heads, rows, 2).unbind(dim=2))


def _blocks(group: int, rows: int, first_row: int, like: torch.Tensor) -> list[_Block]:
    """All attention rows of a KV head: whole query heads while they fit into `ROW_BLOCK`, else pieces of each."""
    heads, most = min(group, max(1, ROW_BLOCK // rows)), min(rows, ROW_BLOCK)
    scratch = like.new_empty(heads * most * (first_row + rows))
    future = like.new_full((most, most), -torch.inf).triu_(1).repeat(heads, 1)
    blocks = []
    for head in range(0, group, heads):
        for start in range(0, rows, ROW_BLOCK):
            stop = min(start + ROW_BLOCK, rows)
            block = slice(head * rows + start, min(head + heads, group) * rows - rows + stop)
            count, width = block.stop - block.start, stop - start
            logits = scratch[: count * (first_row + stop)].view(count, -1)
            blocks.append(_Block(block, logits, logits[:, -width:], future[:count, :width]))
    return blocks


def _weights(block: _Block, query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """exp(S - rowmax(S)), in place of the logits; where the key lies after the row, as good as 0."""
    # beta is 0: the first argument is not read
    torch.addmm(keys[0, :1], query, keys.T, beta=0, alpha=scaling, out=block.logits)
    block.corner.add_(block.future)
    block.logits.sub_(block.logits.amax(dim=1, keepdim=True))
    return block.logits.clamp_(min=FAINTEST_LOGIT).exp_()
