"""Gathering the kept rows of a prompt into a parcel body, the naive way."""

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
    num_kv_heads = keys[0].shape[0]
    picked = indices.split(list(num_kept))
    rows = []
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        heads = picked[layer * num_kv_heads : (layer + 1) * num_kv_heads]
        rows += [key[head, tokens.long()] for head, tokens in enumerate(heads)]
        rows += [value[head, tokens.long()] for head, tokens in enumerate(heads)]
    out.copy_(torch.cat(rows))
