"""Gathers the selected KV of all layers into the parcel body, which lies in the arena.

On a CPU the gather writes straight into the arena: the only copy that a parcel makes on the prefill side. On a GPU one
kernel gathers into device memory and the copy engine brings the bytes over while the next prompt is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby

import torch

from prefill_worker.compression.pipeline import Selection
from prefill_worker.engine.engine import Prefilled
from prefill_worker.parcel.host_rows import Arrival, copy_rows, write_where_kv_lies
from shared.kernels.dispatch import kernels_for
from shared.kv.layout import KVLayout
from shared.model.spec import TORCH_DTYPES


def kept_counts(prefilled: Prefilled, selections: Sequence[Selection]) -> tuple[int, ...]:
    """Rows kept per layer and KV head, layer-major."""
    shaped = prefilled.held or prefilled.keys
    layers = zip(shaped, selections, strict=True)
    return tuple(count for layer, selection in layers for count in selection.num_kept(*layer.shape[:2]))


def write_body(
    prefilled: Prefilled,
    selections: Sequence[Selection],
    num_kept: Sequence[int],
    layout: KVLayout,
    body: memoryview,
) -> Arrival:
    """Writes the parcel body in the order of `KVLayout.sections`.

    Args:
        num_kept: As `kept_counts`.
        body: Writable, exactly `layout.body_bytes(num_kept)` long; must stay until it has arrived.
    """
    target = torch.frombuffer(body, dtype=TORCH_DTYPES[layout.dtype]).view(-1, layout.head_dim)
    write = partial(gather_kept, prefilled, selections, num_kept, layout)
    return write_where_kv_lies(write, target, prefilled.keys[0].device)


@torch.inference_mode()
def gather_kept(
    prefilled: Prefilled,
    selections: Sequence[Selection],
    num_kept: Sequence[int],
    layout: KVLayout,
    out: torch.Tensor,
) -> None:
    """Fills `out`, [all kept rows, head_dim] where the KV lies, in the order of `KVLayout.sections`."""
    if prefilled.held:
        _gather_held(prefilled, selections, out)
        return
    keys = [key.contiguous() for key in prefilled.keys]
    values = [value.contiguous() for value in prefilled.values]
    chosen = zip(keys, selections, strict=True)
    indices = torch.cat([selection.indices(key, prefilled.survivors) for key, selection in chosen])
    _gather(keys, values, indices, num_kept, out)
    _put_merged(selections, layout, num_kept, out)


def _gather(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    indices: torch.Tensor,
    num_kept: Sequence[int],
    out: torch.Tensor,
) -> None:
    """At once for all layers of one length: those behind a sparse pass's drop hold fewer tokens."""
    heads, first, row = len(keys[0]), 0, 0
    for _, group in groupby(keys, key=lambda key: key.shape):
        alike = slice(first, first + len(list(group)))
        counts = num_kept[alike.start * heads : alike.stop * heads]
        rows = slice(row, row + sum(counts))
        target = out[2 * rows.start : 2 * rows.stop]
        kernels_for(out.device).gather_rows(keys[alike], values[alike], indices[rows], counts, target)
        first, row = alike.stop, rows.stop


def _gather_held(prefilled: Prefilled, selections: Sequence[Selection], out: torch.Tensor) -> None:
    """After a cascade: what is still held is little more than what is kept."""
    layers = []
    for key, value, held, selection in zip(prefilled.keys, prefilled.values, prefilled.held, selections, strict=True):
        assert selection.chosen is not None, "a budget below 1 chooses"
        assert not bool((selection.chosen & ~held).any()), "a bound was too low"
        layers.append((key, value, selection.chosen[held].nonzero().flatten()))
    copy_rows(layers, out)


def _put_merged(selections: Sequence[Selection], layout: KVLayout, num_kept: Sequence[int], out: torch.Tensor) -> None:
    """Rows that dropped tokens were merged into take the place of those that were gathered."""
    for section, selection in zip(layout.sections(num_kept), selections, strict=True):
        if selection.merged is not None:
            first, last = section.key_offset // layout.row_bytes, section.end // layout.row_bytes
            torch.cat(selection.merged, out=out[first:last])
