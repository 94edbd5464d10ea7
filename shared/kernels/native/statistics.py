"""Post-vision statistics in C, with the tile products (AMX) of processors that have them; see the reference twin."""

from __future__ import annotations

import ctypes
import math

import torch

from shared.kernels.native.library import gomp_parallel, statistics_function
from shared.kernels.reference import statistics as reference
from shared.kernels.reference.statistics import PostVisionStatistics

MAX_HEAD_DIM = 256
# as in statistics_call.h
BLOCK_ROWS = 64
TILE_KEYS = 16


class _Call(ctypes.Structure):
    """See statistics_call.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "visual", "columns", "counts", "masses")),
        *((name, ctypes.c_void_p) for name in ("parts", "weights")),
        *((name, ctypes.c_int64) for name in ("query_head_bytes", "query_row_bytes", "key_head_bytes", "key_bytes")),
        *((name, ctypes.c_int64) for name in ("num_kv_heads", "group", "rows", "num_keys", "head_dim")),
        *((name, ctypes.c_int64) for name in ("blocks", "padded_keys")),
        *((name, ctypes.c_float) for name in ("scaling", "threshold")),
        *((name, ctypes.c_long) for name in ("next_block", "next_thread")),
    )


def available() -> bool:
    """Whether the kernel was built for this machine and its processor has the tiles; calls run on torch otherwise."""
    return statistics_function() is not None


def post_vision_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    first_row: int,
    scaling: float,
    threshold: float,
    visual: torch.Tensor | None = None,
) -> PostVisionStatistics:
    """See `reference.post_vision_statistics`, which serves what the kernel does not: all but bf16, odd head sizes.

    Runs on torch's threads, as many as `torch.get_num_threads()`; the result does not depend on their number.
    """
    function = statistics_function()
    if function is None or not _suits(query, key, scaling):
        return reference.post_vision_statistics(query, key, first_row, scaling, threshold, visual)
    assert key.shape[1] == first_row + query.shape[1], "the observed rows are the last ones"
    sizes = _sizes(query, key)
    threads = min(torch.get_num_threads(), sizes["num_kv_heads"] * sizes["blocks"])
    buffers = _buffers(sizes, threads)
    # named, so that a copy lives until the kernel has read it
    parted = None if visual is None else visual.contiguous()
    call = _Call(
        query=query.data_ptr(),
        key=key.data_ptr(),
        visual=None if parted is None else parted.data_ptr(),
        scaling=scaling,
        threshold=max(threshold, reference.FAINTEST_WEIGHT),
        **{name: buffer.data_ptr() for name, buffer in buffers.items()},
        **sizes,
        **_steps(query, key),
    )
    function(ctypes.byref(call), gomp_parallel(), threads)
    masses = (None, None) if visual is None else buffers["masses"].unbind()
    return PostVisionStatistics(buffers["columns"], buffers["counts"].sum(dim=1), *masses)


def _sizes(query: torch.Tensor, key: torch.Tensor) -> dict[str, int]:
    num_query_heads, rows, head_dim = query.shape
    num_kv_heads, num_keys, _ = key.shape
    group = num_query_heads // num_kv_heads
    return {
        "num_kv_heads": num_kv_heads,
        "group": group,
        "rows": rows,
        "num_keys": num_keys,
        "head_dim": head_dim,
        "blocks": math.ceil(group * rows / BLOCK_ROWS),
        "padded_keys": math.ceil(num_keys / TILE_KEYS) * TILE_KEYS,
    }


def _steps(query: torch.Tensor, key: torch.Tensor) -> dict[str, int]:
    return {
        "query_head_bytes": query.stride(0) * query.element_size(),
        "query_row_bytes": query.stride(1) * query.element_size(),
        "key_head_bytes": key.stride(0) * key.element_size(),
        "key_bytes": key.stride(1) * key.element_size(),
    }


def _buffers(sizes: dict[str, int], threads: int) -> dict[str, torch.Tensor]:
    num_kv_heads, blocks, padded_keys = sizes["num_kv_heads"], sizes["blocks"], sizes["padded_keys"]
    per_row = num_kv_heads * sizes["group"], sizes["rows"]
    return {
        "columns": torch.empty(num_kv_heads, sizes["num_keys"]),
        "counts": torch.empty(per_row, dtype=torch.int32),
        "masses": torch.empty(2, *per_row),
        "parts": torch.empty(num_kv_heads, blocks, padded_keys),
        "weights": torch.empty(threads, BLOCK_ROWS, padded_keys),
    }


def _suits(query: torch.Tensor, key: torch.Tensor, scaling: float) -> bool:
    head_dim = query.shape[-1]
    served = query.is_cpu and query.dtype == key.dtype == torch.bfloat16 and scaling > 0
    return served and query.stride(-1) == key.stride(-1) == 1 and head_dim % 32 == 0 and head_dim <= MAX_HEAD_DIM
