"""The KV memory of a decode worker: one buffer, allocated and touched once, cut into one extent per sequence.

Inside an extent every layer has one slab for K and one for V with room for the tokens to come, so attention reads
contiguous memory and no page table is needed. Lengths are per layer and KV head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from shared.errors import ResourceExhaustedError, TooLargeError
from shared.kv.extents import Extent, ExtentAllocator
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class HeadGroup:
    """Neighbouring KV heads of one layer that keep the same number of tokens.

    Attributes:
        heads: Which heads.
        key: [heads, capacity, head_dim]; rows beyond `length` are undefined.
        value: As `key`.
        length: Tokens present.
    """

    heads: slice
    key: torch.Tensor
    value: torch.Tensor
    length: int

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Adds one token; both arguments are [num_kv_heads, head_dim] of the whole layer."""
        self.key[:, self.length] = key[self.heads]
        self.value[:, self.length] = value[self.heads]
        self.length += 1


SequenceKV = list[list[HeadGroup]]
"""The KV of one sequence: head groups per layer."""


class KVPool:
    """Owner of the KV memory. One thread allocates and frees; sequences write their own extents."""

    def __init__(self, capacity: int, layout: KVLayout) -> None:
        self.layout = layout
        self._extents = ExtentAllocator(capacity)
        # touched now: a page fault costs four times the copy it interrupts
        self._bytes = torch.zeros(self._extents.capacity, dtype=torch.uint8)
        self._bytes.fill_(0)

    @property
    def capacity(self) -> int:
        """Bytes of the pool."""
        return self._extents.capacity

    @property
    def used_bytes(self) -> int:
        """Bytes in extents."""
        return self._extents.used_bytes

    def sequence_bytes(self, num_kept: tuple[int, ...], growth: int) -> int:
        """Exact bytes of a sequence that starts with `num_kept` and grows by `growth` tokens."""
        return self.layout.body_bytes([kept + growth for kept in num_kept])

    def allocate(self, nbytes: int) -> Extent:
        """A piece of memory.

        Raises:
            ResourceExhaustedError: There is no room now.
            TooLargeError: There never will be.
        """
        if nbytes > self.capacity:
            raise TooLargeError(
                f"the request may need {nbytes} bytes of KV, this worker has {self.capacity} in all",
            )
        extent = self._extents.allocate(nbytes)
        if extent is None:
            raise ResourceExhaustedError("the KV memory is full", reason="KV_FULL", retry_after_s=0.1)
        return extent

    def shrink(self, extent: Extent, nbytes: int) -> Extent:
        """Gives back what the reservation's bound had too much."""
        return self._extents.shrink(extent, nbytes)

    def free(self, extent: Extent) -> None:
        """Gives an extent back; no thread may use it any more."""
        self._extents.free(extent)

    def install(self, extent: Extent, manifest: Manifest, body: memoryview, growth: int) -> SequenceKV:
        """Copies a parcel body into an extent; runs in any thread.

        Args:
            extent: At least `sequence_bytes(manifest.num_kept, growth)` long.
            body: As `KVLayout.sections` describes it; may be read-only.
            growth: Tokens to come.
        """
        source = np.frombuffer(body, dtype=np.uint8)
        target = self._bytes[extent.offset : extent.end]
        layers, offset = [], 0
        for section in self.layout.sections(manifest.num_kept):
            groups, key_at, value_at = [], section.key_offset, section.value_offset
            for heads, kept in _equal_runs(section.rows):
                group, offset = self._carve(target, offset, heads, kept, growth)
                key_at = self._fill(group.key, source, key_at, kept)
                value_at = self._fill(group.value, source, value_at, kept)
                groups.append(group)
            layers.append(groups)
        return layers

    def check_integrity(self) -> None:
        """Asserts the conservation law."""
        self._extents.check_integrity()

    def _carve(self, target: torch.Tensor, offset: int, heads: slice, kept: int, growth: int) -> tuple[HeadGroup, int]:
        """A group's two slabs, starting at `offset` of the extent; returns them and where they end."""
        num_heads, capacity = heads.stop - heads.start, kept + growth
        nbytes = num_heads * capacity * self.layout.row_bytes
        dtype, shape = TORCH_DTYPES[self.layout.dtype], (num_heads, capacity, self.layout.head_dim)
        key = target[offset : offset + nbytes].view(dtype).view(shape)
        value = target[offset + nbytes : offset + 2 * nbytes].view(dtype).view(shape)
        return HeadGroup(heads, key, value, kept), offset + 2 * nbytes

    def _fill(self, slab: torch.Tensor, source: np.ndarray, at: int, kept: int) -> int:
        """Copies rows [at ...] of the body into the first `kept` tokens of a slab; returns where they ended.

        Through numpy: torch wraps no read-only buffer without a warning, and numpy knows no bfloat16, so bytes move.
        """
        num_heads, row_bytes = slab.shape[0], self.layout.row_bytes
        end = at + num_heads * kept * row_bytes
        target = slab.view(torch.uint8).numpy()
        np.copyto(target[:, :kept], source[at:end].reshape(num_heads, kept, row_bytes))
        return end


def _equal_runs(rows: tuple[int, ...]) -> Iterator[tuple[slice, int]]:
    """Neighbouring heads with equal counts."""
    start = 0
    for kept, run in itertools.groupby(rows):
        stop = start + len(list(run))
        yield slice(start, stop), kept
        start = stop
