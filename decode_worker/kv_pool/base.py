"""What a KV pool is: the whole KV memory of a decode worker, allocated once, behind one interface.

Two storages implement it: slabs (`slabs.py`, contiguous, for the CPU) and blocks (`blocks.py`, paged, for a GPU).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from shared.errors import ResourceExhaustedError, TooLargeError
from shared.kv.layout import KVLayout
from shared.model.attention import LayerHook


class Allocation(Protocol):
    """Memory of one sequence; whoever holds it gives it back to its pool once."""

    @property
    def nbytes(self) -> int:
        """Bytes taken from the pool."""


@dataclass(eq=False, kw_only=True)
class SequenceKV:
    """The KV of one sequence. The step thread alone advances `appended`.

    Attributes:
        kept: [num_layers, num_kv_heads] int64, tokens present when it was installed.
        room: Tokens that may be appended.
        appended: Tokens appended so far; the same for all layers and heads.
    """

    kept: np.ndarray
    room: int
    appended: int = 0

    @property
    def full(self) -> bool:
        """Whether the next token has no place."""
        return self.appended == self.room

    @property
    def lengths(self) -> np.ndarray:
        """[num_layers, num_kv_heads] int64, tokens present now."""
        return self.kept + self.appended


@dataclass(frozen=True, kw_only=True)
class ExportedKV:
    """A sequence's KV outside the pool, as a parcel body: `KVLayout.sections(num_kept)` describes it."""

    num_kept: tuple[int, ...]
    body: memoryview


SomeAllocation = TypeVar("SomeAllocation", bound=Allocation)
SomeKV = TypeVar("SomeKV", bound=SequenceKV)


class KVPool(ABC, Generic[SomeAllocation, SomeKV]):
    """Owner of the KV memory.

    `allocate`, `shrink` and `free` belong to one thread, the event loop. `install` and `export` touch only the memory
    of their sequence and run in any thread. `attention` belongs to the step thread.

    Conservation law: used + free = capacity, and no two allocations share memory.
    """

    layout: KVLayout

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Bytes of the pool."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes in allocations."""

    @property
    @abstractmethod
    def fragmentation(self) -> float:
        """Share of the free bytes that one allocation cannot have, 0 to 1."""

    @abstractmethod
    def sequence_bytes(self, num_kept: Sequence[int], growth: int) -> int:
        """Exact bytes of a sequence that starts with `num_kept` and grows by `growth` tokens."""

    @abstractmethod
    def bound_bytes(self, kept_tokens: int, growth: int) -> int:
        """Bytes that suffice for any sequence whose layers and heads keep `kept_tokens` on average."""

    def check_fits(self, nbytes: int) -> None:
        """Compares with the whole pool.

        Raises:
            TooLargeError: There never will be room for that much.
        """
        if nbytes > self.capacity:
            raise TooLargeError(f"the request may need {nbytes} bytes of KV, this worker has {self.capacity} in all")

    def allocate(self, nbytes: int) -> SomeAllocation:
        """A piece of memory.

        Raises:
            ResourceExhaustedError: There is no room now.
            TooLargeError: There never will be.
        """
        self.check_fits(nbytes)
        allocation = self._allocate(nbytes)
        if allocation is None:
            raise ResourceExhaustedError("the KV memory is full", reason="KV_FULL", retry_after_s=0.1)
        return allocation

    @abstractmethod
    def _allocate(self, nbytes: int) -> SomeAllocation | None:
        """A piece of memory, or None when there is no room now."""

    @abstractmethod
    def shrink(self, allocation: SomeAllocation, nbytes: int) -> SomeAllocation:
        """Gives back what is more than `nbytes`; the returned allocation replaces the old one."""

    @abstractmethod
    def free(self, allocation: SomeAllocation) -> None:
        """Gives an allocation back; no thread may use it any more. Freeing it twice is a bug."""

    @abstractmethod
    def install(self, allocation: SomeAllocation, num_kept: Sequence[int], body: memoryview, growth: int) -> SomeKV:
        """Copies a parcel body into memory of at least `sequence_bytes(num_kept, growth)`.

        Args:
            num_kept: Layer-major, one count per layer and KV head.
            body: As `KVLayout.sections` describes it; may be read-only.
            growth: Tokens to come.
        """

    @abstractmethod
    def export(self, kv: SomeKV) -> ExportedKV:
        """Copies a sequence out, appended tokens included; `install` brings it back bit by bit."""

    @abstractmethod
    def attention(self, batch: Sequence[SomeKV]) -> LayerHook:
        """The attention of one step: appends each sequence's new token, then attends; one query per sequence."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Asserts the conservation law."""
