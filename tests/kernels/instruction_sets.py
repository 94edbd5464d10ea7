"""Running the native kernel as it was compiled for one instruction set; whether the processor has the tiles."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.kernels.native.build import INSTRUCTION_SETS, TILES

POINTERS = ("query", "key", "value", "out", "pool", "key_at", "value_at", "lengths")
SHARED = ("shared_key_at", "shared_value_at", "shared_lengths")
COUNTS = ("rows", "group", "head_dim")


class Step(ctypes.Structure):
    """See slab_step.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*POINTERS, *SHARED)),
        *((name, ctypes.c_int64) for name in COUNTS),
        ("scaling", ctypes.c_float),
        ("is_bf16", ctypes.c_int),
        ("threads", ctypes.c_int64),
        ("next", ctypes.c_long),
    ]


def runnable() -> list[str]:
    """The instruction sets that this processor has and the library was built for."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needs = {"base": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "fma")}
    return [name for name in INSTRUCTION_SETS if all(f" {flag} " in cpu for flag in needs[name])]


def function_of(library: Path, name: str) -> Callable[..., None]:
    """A stand-in for the library's `slab_attention`, with its arguments."""
    rows = getattr(ctypes.CDLL(str(library)), f"slab_rows_{name}")

    def run(*arguments: object) -> None:
        *values, _parallel, _threads = arguments
        rows(ctypes.byref(Step(*values, 1, 0)))

    return run


def tiles_miss(compiler: Sequence[str]) -> str | None:
    """Why the statistics cannot be native here, found out without them; None where they must be."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not all(flag in cpu for flag in ("avx512f", "amx_tile", "amx_bf16")):
        return "the processor has no AMX"
    asked = [*compiler, *TILES, "-E", "-x", "c", os.devnull, "-o", os.devnull]
    known = subprocess.run(asked, check=False, capture_output=True).returncode == 0
    return None if known else "the compiler does not know AMX"
