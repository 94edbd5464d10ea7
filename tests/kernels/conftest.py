"""Both backends of every kernel, on the GPU or interpreted on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from shared.kernels.dispatch import Kernels, kernels_for


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where the kernels are compiled; the CPU where they are interpreted (see tests/conftest.py)."""
    if importlib.util.find_spec("triton") is None:
        return torch.device("cpu")
    interpreted = importlib.import_module("shared.kernels.triton.environment").INTERPRETED
    return torch.device("cpu" if interpreted else "cuda")


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest, device: torch.device) -> Kernels:
    if request.param == "triton":
        pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    return kernels_for(device, request.param)
