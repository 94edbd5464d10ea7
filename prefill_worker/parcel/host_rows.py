"""How rows of KV come to host memory: on a CPU by the copy that picks them, from a GPU behind its back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Arrival = Callable[[], object]
"""Waits until the rows are complete in host memory; may be called in any thread."""
LayerRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values of a layer, and which of their rows, head after head."""


def copy_rows(layers: Iterable[LayerRows], out: torch.Tensor) -> None:
    """Fills `out`, [rows, head_dim], with the K rows and then the V rows of each layer."""
    first = 0
    for key, value, rows in layers:
        for tensor in (key, value):
            target = out[first : first + len(rows)]
            torch.index_select(tensor.view(-1, out.shape[1]), 0, rows, out=target)
            first += len(rows)


def write_where_kv_lies(write: Callable[[torch.Tensor], None], target: torch.Tensor, device: torch.device) -> Arrival:
    """Has `target`, in host memory, written: at once on a CPU, else through a tensor of its kind on the device."""
    if device.type == "cpu":
        write(target)
        return lambda: None
    staging = torch.empty(target.shape, dtype=target.dtype, device=device)
    write(staging)
    return _bring_over(staging, target)


def _bring_over(staging: torch.Tensor, target: torch.Tensor) -> Arrival:
    """Starts the copy in a stream of its own, so that the next prompt's kernels do not queue behind it."""
    copies = torch.cuda.Stream(staging.device)
    copies.wait_stream(torch.cuda.current_stream(staging.device))
    with torch.cuda.stream(copies):
        target.copy_(staging, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    # its memory is given to nobody else before the copy is done
    staging.record_stream(copies)
    return arrived.synchronize
