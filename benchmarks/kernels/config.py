"""What the kernel benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from shared.model.loading import DTYPES


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """What to measure. The defaults are an 8B model's layers in a batch of 16."""

    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` runs the reference kernels: it tries the benchmark, its figures say nothing about the kernels."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of queries and KV."""
    batch: int = 16
    """Sequences in the step."""
    query_heads: int = 32
    """Query heads."""
    kv_heads: int = 8
    """KV heads."""
    head_dim: int = 128
    """Dimensions of a head."""
    layers: int = 8
    """Layers that one measurement goes through: together larger than the device's cache, as a model's are."""
    prompt: int = 2000
    """Prompt tokens of each sequence."""
    retention: float = 0.1
    """Kept share of the KV; kept lengths differ by layer and head."""
    rows: int = 64
    """Prompt tokens after the image: the rows that are observed."""
    block_size: int = 64
    """Tokens per block of the pool."""
    copy_mib: int = 2048
    """Bytes of the device copy that gives the bandwidth."""
    rounds: int = 30
    """Measurements of each variant."""
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE|-")] = None
    """Where to write the figures; `-` prints them as the last line."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def scaling(self) -> float:
        """Factor of the logits."""
        return float(self.head_dim**-0.5)
