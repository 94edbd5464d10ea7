"""What the real compiler makes of the kernels, for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Shared memory that one program may use, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# A few spilled registers hurt nobody; beyond, the inner loop would go through memory.
STACK_LIMIT = 64
KERNELS = {
    "_attend_split",
    "_merge_splits",
    "_append",
    "_gather",
    "_sweep_rows",
    "_merge_blocks",
    "_sweep_columns",
}
VECTOR_BYTES = 16


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Everything, compiled from scratch in a process that does not interpret."""
    pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.compilation"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_target_and_dtype(compiled: list[dict[str, Any]]) -> None:
    for name in KERNELS:
        found = {(case["capability"], case["dtype"]) for case in compiled if case["kernel"] == name}
        assert found >= {(90, f"torch.{dtype}") for dtype in ("bfloat16", "float16", "float32")}, name
        assert found >= {(other, f"torch.{dtype}") for other in (80, 100) for dtype in ("bfloat16", "float32")}, name
    assert {case["kernel"] for case in compiled} == KERNELS
    for case in compiled:
        assert case["cubin_bytes"] > 0
        assert [target.rstrip("a") for target in case["target"]] == [f"sm_{case['capability']}"]


def test_shared_memory_and_registers_suffice(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        assert case["shared_bytes"] <= SHARED_LIMIT[case["capability"]], case
        assert case["stack_bytes"] <= STACK_LIMIT, case


def test_attention_has_three_programs_on_a_multiprocessor(compiled: list[dict[str, Any]]) -> None:
    """Its bandwidth rests on that many copies being on their way; each program costs one KiB more."""
    halves = [case for case in compiled if case["kernel"] == "_attend_split" and case["dtype"] != "torch.float32"]
    for case in halves:
        if case["capability"] == 90:
            assert 3 * (case["shared_bytes"] + 1024) <= 228 * 1024, case


def test_keys_and_values_arrive_in_wide_asynchronous_copies(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        if case["kernel"] == "_attend_split":
            assert set(case["copies"]) == {VECTOR_BYTES}, case


def test_gathered_rows_move_in_wide_words(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        if case["kernel"] == "_gather":
            assert set(case["stores"]) == {8 * VECTOR_BYTES}, case
            # the rest of the loads are the plan's and the indices'
            assert set(case["loads"]) == {32, 64, 8 * VECTOR_BYTES}, case
