"""Gathering the kept rows of a prompt into a parcel body in torch: the CPU's path, and the Triton kernel's twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.kernels.gather_arguments import check_gather


def gather_rows(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    indices: torch.Tensor,
    num_kept: Sequence[int],
    out: torch.Tensor,
) -> None:
    """Writes the kept rows of all layers in the order of `KVLayout.sections`.

    Args:
        keys: Per layer [num_kv_heads, num_tokens, head_dim], contiguous in head_dim, strides equal for all layers.
        values: As `keys`.
        indices: [sum(num_kept)] int32, token indices, layer-major, then head-major.
        num_kept: Rows per layer and KV head, layer-major; may be 0.
        out: [2 * sum(num_kept), head_dim], contiguous: for each layer the K rows of head 0, of head 1 ..., then the
            V rows in the same order.

    Raises:
        ValueError: Shapes, strides or counts contradict each other.
    """
    check_gather(keys, values, indices, num_kept, out)
    at, begin, counts = 0, 0, list(num_kept)
    for key, value in zip(keys, values, strict=True):
        kept, counts = counts[: len(key)], counts[len(key) :]
        for rows in (key, value):
            first = begin
            for head, count in enumerate(kept):
                torch.index_select(rows[head], 0, indices[first : first + count], out=out[at : at + count])
                first, at = first + count, at + count
        begin += sum(kept)
