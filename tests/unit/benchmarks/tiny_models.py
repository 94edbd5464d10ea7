"""Random models that are small enough for tests, on the CPU's path and, without a GPU, on a GPU's."""

from __future__ import annotations

from typing import Any, TypeVar

from benchmarks.random_llama import ModelConfig

SIZES: dict[str, Any] = {"dtype": "float32", "kv_heads": 1, "layers": 3, "hidden": 256, "vocabulary": 97}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]

SomeConfig = TypeVar("SomeConfig", bound=ModelConfig)


def gpu_path(config: type[SomeConfig]) -> type[SomeConfig]:
    """The same settings, run with blocks, graphs and one variant after another, but by the CPU."""
    return type(config.__name__, (config,), {"on_gpu": True})


def cpu_path(config: type[SomeConfig]) -> type[SomeConfig]:
    return config
