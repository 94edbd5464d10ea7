"""The one door to the kernels: decides once per device whether Triton's, native ones or the reference's are used."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from shared.kernels.native import slab_attention as native_slab_attention
from shared.kernels.native import statistics as native_statistics
from shared.kernels.reference import append, gather, paged_attention, slab_attention, statistics
from shared.kernels.reference.slab_attention import SharedSlabs

log = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "reference"]


class PagedAttention(Protocol):
    """See `reference.paged_attention`."""

    def __call__(
        self,
        query: torch.Tensor,
        key_blocks: torch.Tensor,
        value_blocks: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor,
        scaling: float,
        num_splits: int,
        first: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class AppendToken(Protocol):
    """See `reference.append`."""

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_blocks: torch.Tensor,
        value_blocks: torch.Tensor,
        block_table: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor,
    ) -> None: ...


class GatherRows(Protocol):
    """See `reference.gather`."""

    def __call__(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        indices: torch.Tensor,
        num_kept: Sequence[int],
        out: torch.Tensor,
    ) -> None: ...


class PostVisionStatistics(Protocol):
    """See `reference.statistics`."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        first_row: int,
        scaling: float,
        threshold: float,
        visual: torch.Tensor | None = None,
    ) -> statistics.PostVisionStatistics: ...


class SlabAttention(Protocol):
    """See `reference.slab_attention`."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pool: torch.Tensor,
        key_at: torch.Tensor,
        value_at: torch.Tensor,
        lengths: torch.Tensor,
        scaling: float,
        shared: SharedSlabs | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of one backend; whoever holds them never asks which one it is."""

    name: str
    paged_attention: PagedAttention
    append_token: AppendToken
    gather_rows: GatherRows
    post_vision_statistics: PostVisionStatistics
    slab_attention: SlabAttention


REFERENCE = Kernels(
    name="reference",
    paged_attention=paged_attention.paged_attention,
    append_token=append.append_token,
    gather_rows=gather.gather_rows,
    post_vision_statistics=statistics.post_vision_statistics,
    slab_attention=slab_attention.slab_attention,
)


@functools.cache
def kernels_for(device: torch.device, backend: Backend = "auto") -> Kernels:
    """The kernels for tensors of one device; decided and logged at the first call.

    Args:
        device: Where the tensors are.
        backend: `auto` takes Triton on a CUDA device when it can be imported, and what was compiled for a CPU.

    Raises:
        ValueError: `triton` was asked for where it cannot run.
    """
    if backend == "reference":
        log.info("reference kernels on %s: as asked", device)
        return REFERENCE
    if backend == "auto" and device.type != "cuda":
        kernels = _cpu_kernels()
        log.info("%s kernels on %s: no CUDA device", kernels.name, device)
        return kernels
    try:
        kernels = _triton_kernels(device)
    except (ImportError, ValueError) as error:
        if backend == "triton":
            raise ValueError(f"Triton's kernels cannot run on {device}: {error}") from error
        log.warning("reference kernels on %s, which are slow: %s", device, error)
        return REFERENCE
    log.info("Triton's kernels on %s", device)
    return kernels


def _cpu_kernels() -> Kernels:
    kernels = REFERENCE
    if native_slab_attention.available():
        kernels = replace(kernels, name="native", slab_attention=native_slab_attention.slab_attention)
    if native_statistics.available():
        kernels = replace(kernels, name="native", post_vision_statistics=native_statistics.post_vision_statistics)
    return kernels


def _triton_kernels(device: torch.device) -> Kernels:
    """Imports them: the one place that does, since Triton is no dependency of a CPU installation.

    Raises:
        ImportError: Triton is missing or broken.
        ValueError: There is no GPU to compile for.
    """
    folder = "shared.kernels.triton"
    if device.type != "cuda" and not importlib.import_module(f"{folder}.environment").INTERPRETED:
        raise ValueError("it is no CUDA device and TRITON_INTERPRET is not set")
    return Kernels(
        name="triton",
        paged_attention=importlib.import_module(f"{folder}.paged_attention").paged_attention,
        append_token=importlib.import_module(f"{folder}.append").append_token,
        gather_rows=importlib.import_module(f"{folder}.gather").gather_rows,
        post_vision_statistics=importlib.import_module(f"{folder}.statistics").post_vision_statistics,
        slab_attention=slab_attention.slab_attention,  # a GPU has no slabs
    )
