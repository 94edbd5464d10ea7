"""Compiles the kernels for GPUs that are not there, exactly as their wrappers would launch them.

    python -m tests.kernels.compilation

prints one JSON object per compiled kernel. It needs a process of its own: one without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from shared.kernels.triton.append import append_token
from shared.kernels.triton.gather import gather_rows
from shared.kernels.triton.paged_attention import paged_attention
from shared.kernels.triton.statistics import post_vision_statistics

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Shape:
    """What the kernels are specialised on."""

    group: int
    kv_heads: int
    head_dim: int
    block_size: int
    splits: int


GQA = Shape(4, 2, 128, 16, 4)
MHA = Shape(1, 4, 80, 64, 1)
WIDE = Shape(7, 1, 256, 32, 32)
# half precisions differ in one instruction: the other targets compile one of them
CASES = [
    *((90, GQA, dtype) for dtype in DTYPES),
    *((capability, GQA, dtype) for capability in (80, 100) for dtype in (torch.bfloat16, torch.float32)),
    *((90, MHA, dtype) for dtype in (torch.bfloat16, torch.float32)),
    (90, WIDE, torch.bfloat16),
]


class AbsentGPU:
    """As much of a driver as Triton asks before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # compiled kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all() -> Iterator[dict[str, Any]]:
    """What every case compiled to."""
    launched: list[tuple[str, Any]] = []

    def compile_only(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            launched.append((kernel.__name__, kernel.run(*args, grid=grid, warmup=True, **kwargs)))

        return launch

    JITFunction.__getitem__ = compile_only
    for capability, shape, dtype in CASES:
        triton.runtime.driver.set_active(AbsentGPU(capability))
        call_all(shape, dtype)
        for name, compiled in launched:
            case = {"kernel": name, "capability": capability, "dtype": str(dtype), **dataclasses.asdict(shape)}
            yield {**case, **describe(compiled)}
        launched.clear()


def call_all(shape: Shape, dtype: torch.dtype) -> None:
    """Every kernel once; the contents do not matter."""
    blocks = torch.zeros(3, shape.block_size, shape.head_dim, dtype=dtype)
    place = (
        torch.zeros(2, shape.kv_heads, 3, dtype=torch.int32),
        torch.ones(2, shape.kv_heads, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
    )
    query = torch.zeros(2, shape.group * shape.kv_heads, shape.head_dim, dtype=dtype)
    paged_attention(query, blocks, blocks, *place, 0.1, shape.splits)
    if shape is GQA:
        paged_attention(query, blocks, blocks, *place, 0.1, shape.splits, torch.zeros_like(place[1]))
    token = query[:, : shape.kv_heads].contiguous()
    append_token(token, token, blocks, blocks, *place)
    layers = [torch.zeros(shape.kv_heads, 70, shape.head_dim, dtype=dtype) for _ in range(2)]
    counts = [33] * 2 * shape.kv_heads
    out = torch.zeros(2 * sum(counts), shape.head_dim, dtype=dtype)
    gather_rows(layers, layers, torch.zeros(sum(counts), dtype=torch.int32), counts, out)
    rows = torch.zeros(shape.group * shape.kv_heads, 30, shape.head_dim, dtype=dtype)
    post_vision_statistics(rows, layers[0], 40, 0.1, 0.01, torch.zeros(70, dtype=torch.bool))


def describe(compiled: Any) -> dict[str, Any]:
    """Sizes, and how memory is accessed: bytes per asynchronous copy, bits per load and store of a thread."""
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    return {
        "target": re.findall(r"^\.target (\w+)", ptx, re.MULTILINE),
        "cubin_bytes": len(cubin),
        "shared_bytes": compiled.metadata.shared,
        "stack_bytes": stack_bytes(cubin),
        "copies": [int(size, 16) for size in re.findall(r"cp\.async\.c[ag][^;]*?, (0x\w+)", ptx)],
        "loads": access_bits("ld", ptx),
        "stores": access_bits("st", ptx),
    }


def access_bits(operation: str, ptx: str) -> list[int]:
    found = re.findall(rf"{operation}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(lanes or 1) * int(bits) for lanes, bits in found]


def stack_bytes(cubin: bytes) -> int:
    """Per thread, as the assembler reports it: registers that did not suffice."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", usage))


if __name__ == "__main__":
    for described in compile_all():
        sys.stdout.write(json.dumps(described) + "\n")
