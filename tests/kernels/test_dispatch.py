"""The door to the kernels: what it decides, that it says so, and that a CPU installation never loads Triton."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared.kernels import dispatch
from shared.kernels.dispatch import REFERENCE, kernels_for
from shared.kernels.native import slab_attention as native_slab_attention

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES = [field.name for field in dataclasses.fields(REFERENCE) if field.name != "name"]


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    kernels_for.cache_clear()
    yield
    kernels_for.cache_clear()


def no_triton(name: str) -> None:
    raise ImportError(f"no {name}")


def test_importing_the_door_loads_no_triton() -> None:
    probe = "import sys, shared.kernels.dispatch; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False).returncode == 0


def test_a_cpu_gets_the_reference_and_hears_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_slab_attention, "available", lambda: False)
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert kernels_for(CPU) is kernels_for(CPU) is REFERENCE
    assert [record.getMessage() for record in caplog.records] == ["reference kernels on cpu: no CUDA device"]


def test_a_cpu_gets_the_native_kernel_where_it_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_slab_attention, "available", lambda: True)
    kernels = kernels_for(CPU)
    assert kernels.name == "native"
    assert kernels.slab_attention is native_slab_attention.slab_attention
    assert [name for name in NAMES if getattr(kernels, name) is not getattr(REFERENCE, name)] == ["slab_attention"]
    assert kernels_for(CPU, "reference") is REFERENCE


def test_a_gpu_gets_triton() -> None:
    pytest.importorskip("triton")
    kernels = kernels_for(CUDA)
    assert kernels.name == "triton"
    assert [name for name in NAMES if getattr(kernels, name) is getattr(REFERENCE, name)] == ["slab_attention"]


def test_a_gpu_without_triton_gets_the_reference_with_a_warning(monkeypatch, caplog) -> None:
    monkeypatch.setattr(importlib, "import_module", no_triton)
    assert kernels_for(CUDA) is REFERENCE
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_backend_that_was_asked_for_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_for(CUDA, "reference") is REFERENCE
    monkeypatch.setattr(importlib, "import_module", no_triton)
    with pytest.raises(ValueError, match="cannot run on cuda: no shared"):
        kernels_for(CUDA, "triton")


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = pytest.importorskip("shared.kernels.triton.environment")
    monkeypatch.setattr(environment, "INTERPRETED", True)
    assert kernels_for(CPU, "triton").name == "triton"
    kernels_for.cache_clear()
    monkeypatch.setattr(environment, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        kernels_for(CPU, "triton")


def test_the_native_twin_takes_the_same_arguments() -> None:
    theirs = inspect.signature(native_slab_attention.slab_attention)
    assert theirs == inspect.signature(REFERENCE.slab_attention)


@pytest.mark.parametrize("name", NAMES)
def test_twins_take_the_same_arguments(name: str) -> None:
    pytest.importorskip("triton")
    theirs = inspect.signature(getattr(kernels_for(CUDA, "triton"), name))
    assert theirs == inspect.signature(getattr(REFERENCE, name))
