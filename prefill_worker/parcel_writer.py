"""Gathers the selected KV straight into the arena: the only copy that a parcel makes on the prefill side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prefill_worker.compression.pipeline import Selection
from prefill_worker.engine import Prefilled
from shared.kv.layout import KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def kept_counts(prefilled: Prefilled, selections: Sequence[Selection]) -> tuple[int, ...]:
    """Rows kept per layer and KV head, layer-major."""
    counts = []
    for key, selection in zip(prefilled.keys, selections, strict=True):
        num_heads, num_tokens, _ = key.shape
        kept = num_tokens if selection.indices is None else selection.indices.shape[1]
        counts += [kept] * num_heads
    return tuple(counts)


@torch.inference_mode()
def write_body(
    prefilled: Prefilled,
    selections: Sequence[Selection],
    num_kept: Sequence[int],
    layout: KVLayout,
    body: memoryview,
) -> None:
    """Writes the parcel body in the order of `KVLayout.sections`.

    Args:
        num_kept: As `kept_counts`.
        body: Writable, exactly `layout.body_bytes(num_kept)` long.
    """
    flat = torch.frombuffer(body, dtype=TORCH_DTYPES[layout.dtype])
    per_row = layout.head_dim
    for section in layout.sections(num_kept):
        start, rows = section.key_offset // layout.row_bytes * per_row, sum(section.rows)
        keys, values = flat[start : start + 2 * rows * per_row].view(2, layout.num_kv_heads, -1, per_row)
        indices = selections[section.layer].indices
        _gather(prefilled.keys[section.layer], indices, keys)
        _gather(prefilled.values[section.layer], indices, values)


def _gather(source: torch.Tensor, indices: torch.Tensor | None, out: torch.Tensor) -> None:
    if indices is None:
        out.copy_(source)
    elif source.device == out.device:
        torch.gather(source, 1, indices[..., None].expand(-1, -1, source.shape[2]), out=out)
    else:
        out.copy_(source.gather(1, indices[..., None].expand(-1, -1, source.shape[2])))
