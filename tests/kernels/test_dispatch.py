"""The door to the kernels: what it decides, that it says so, and that a CPU installation never loads Triton."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from shared.kernels import dispatch
from shared.kernels.dispatch import REFERENCE, kernels_for
from shared.kernels.native import slab_attention as native_slab_attention
from shared.kernels.native import statistics as native_statistics

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
    for module in (native_slab_attention, native_statistics):
        monkeypatch.setattr(module, "available", lambda: False)
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert kernels_for(CPU) is kernels_for(CPU) is REFERENCE
    assert [record.getMessage() for record in caplog.records] == ["reference kernels on cpu: no CUDA device"]


@pytest.mark.parametrize(
    ("module", "name"), [(native_slab_attention, "slab_attention"), (native_statistics, "post_vision_statistics")]
)
def test_a_cpu_gets_each_native_kernel_that_it_can_run(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    for other in (native_slab_attention, native_statistics):
        monkeypatch.setattr(other, "available", lambda: False)
    monkeypatch.setattr(module, "available", lambda: True)
    kernels = kernels_for(CPU)
    assert kernels.name == "native"
    assert getattr(kernels, name) is getattr(module, name)
    assert [other for other in NAMES if getattr(kernels, other) is not getattr(REFERENCE, other)] == [name]
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


@pytest.mark.parametrize(
    "twin", [native_slab_attention.slab_attention, native_statistics.post_vision_statistics], ids=lambda f: f.__name__
)
def test_native_twins_take_the_same_arguments(twin: Callable[..., object]) -> None:
    assert inspect.signature(twin) == inspect.signature(getattr(REFERENCE, twin.__name__))


@pytest.mark.parametrize("name", NAMES)
def test_twins_take_the_same_arguments(name: str) -> None:
    pytest.importorskip("triton")
    theirs = inspect.signature(getattr(kernels_for(CUDA, "triton"), name))
    assert theirs == inspect.signature(getattr(REFERENCE, name))
