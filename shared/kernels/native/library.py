"""The library of native kernels, loaded once per process."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shared.kernels.native.build import library_path

log = logging.getLogger(__name__)

# query, key, value, out, pool, key_at, value_at, lengths; shared: the same three; rows, group, head_dim; scaling;
# is_bf16; parallel, threads
_SLAB_ATTENTION: list[Any] = [ctypes.c_void_p] * 11 + [ctypes.c_int64] * 3
_SLAB_ATTENTION += [ctypes.c_float, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
# the call; parallel, threads
_STATISTICS: list[Any] = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]


@functools.cache
def slab_attention_function() -> Callable[..., None] | None:
    """The kernel, or None, whose reason is logged, where it was not built."""
    try:
        function = _function("slab_attention", _SLAB_ATTENTION)
    except OSError as error:
        log.warning("attention over slabs runs on torch, which is slower: %s (see make setup)", error)
        return None
    log.info("attention over slabs is native")
    return function


@functools.cache
def statistics_function() -> Callable[..., None] | None:
    """The kernel, or None, whose reason is logged, where it was not built or the machine lacks its instructions."""
    try:
        available = _function("statistics_available", [], ctypes.c_int)
    except OSError as error:
        log.warning("post-vision statistics run on torch, which is slower: %s (see make setup)", error)
        return None
    if not available():
        log.info("post-vision statistics run on torch: processor, system or compiler knows no AMX")
        return None
    log.info("post-vision statistics are native")
    return _function("statistics", _STATISTICS)


def _function(name: str, arguments: list[Any], result: type[ctypes.c_int] | None = None) -> Callable[..., Any]:
    function = getattr(ctypes.CDLL(str(library_path())), name)
    function.argtypes, function.restype = arguments, result
    return function


@functools.cache
def gomp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch runs on; None where torch was built without one.

    Looked up as the loader resolves torch's own calls: among what is loaded globally, then in torch's dependencies.
    """
    for name in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
