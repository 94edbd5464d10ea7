"""What a KV pool is: the whole KV memory of a decode worker, allocated once, behind one interface.

Two storages implement it: slabs (`slabs.py`, contiguous, for the CPU) and blocks (`blocks.py`, paged, for a GPU).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from decode_worker.eviction.attention import RuledAttention, StepAttention
from decode_worker.eviction.facts import Move
from decode_worker.eviction.ledger import RowLedger
from decode_worker.eviction.merging import merge_dropped
from decode_worker.kv_pool.rows_first import RowsFirst
from decode_worker.kv_pool.seen_rows import SeenRows
from shared.errors import ResourceExhaustedError, TooLargeError
from shared.kv.layout import KVLayout
from shared.model.attention import LayerHook


class Allocation(Protocol):
    """Memory of one sequence; whoever holds it gives it back to its pool once."""

    @property
    def nbytes(self) -> int:
        """Bytes taken from the pool."""


class Growing(Protocol):
    """What knows how a sequence that evicts grows."""

    def growth(self, tokens: int) -> list[int]:
        """Rows by which each KV head may grow at most while `tokens` come, layer-major."""


@dataclass(eq=False, kw_only=True)
class SequenceKV:
    """The KV of one sequence. The step thread alone advances `appended` and, with it, `eviction`.

    Attributes:
        kept: [num_layers, num_kv_heads] int64, tokens present when it was installed.
        room: Tokens that may be appended.
        appended: Tokens appended so far; the same for all layers and heads.
        eviction: What drops rows, or leaves them unread; None keeps and reads everything.
        seen: What layers with a window see of it; None where every layer sees everything.
        shared: Rows that others read as well, before its own and counted in `kept`; None where all are its own.
    """

    kept: np.ndarray
    room: int
    appended: int = 0
    eviction: RowLedger | None = None
    seen: SeenRows | None = None
    shared: SequenceKV | None = None

    @property
    def full(self) -> bool:
        """Whether the next token has no place."""
        return self.appended == self.room

    @property
    def lengths(self) -> np.ndarray:
        """[num_layers, num_kv_heads] int64, tokens present now."""
        return self.kept + self.appended if self.eviction is None else self.eviction.lengths

    @property
    def shared_lengths(self) -> np.ndarray:
        """[num_layers, num_kv_heads] int64, rows of them that are shared."""
        return np.zeros_like(self.kept) if self.shared is None else self.shared.kept

    @property
    def eviction_outside(self) -> RowLedger | None:
        """A copy of the eviction in host memory."""
        return self.eviction and self.eviction.settled(int(self.lengths.max()), torch.device("cpu"))

    @property
    def seen_outside(self) -> SeenRows | None:
        """What its windows see when it comes into a pool again."""
        return self.seen and replace(self.seen, age=self.seen.age + self.appended)


@dataclass(frozen=True, kw_only=True)
class ExportedKV:
    """A sequence's KV outside the pool, as a parcel body: `KVLayout.sections(num_kept)` describes it."""

    num_kept: tuple[int, ...]
    body: memoryview
    eviction: RowLedger | None = None
    seen: SeenRows | None = None


SomeAllocation = TypeVar("SomeAllocation", bound=Allocation)
SomeKV = TypeVar("SomeKV", bound=SequenceKV)


class KVPool(ABC, Generic[SomeAllocation, SomeKV]):
    """Owner of the KV memory.

    `allocate`, `shrink` and `free` belong to one thread, the event loop. `install` and `export` touch only the memory
    of their sequence and run in any thread. `attention`, `replay` and `complete` belong to the step thread, and so does
    the access to rows, which is for evictions.

    Several sequences may read the same first rows (`shareable`), which are an allocation of their own that each of them
    holds. Nobody writes there: no sequence that evicts shares anything.

    Conservation law: used + free = capacity, and no two allocations share memory.
    """

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        # of allocations that more than one holds: how many more
        self._more_holders: dict[SomeAllocation, int] = {}

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
    def sequence_bytes(self, num_kept: Sequence[int], growth: int | Sequence[int]) -> int:
        """Exact bytes of a sequence that starts with `num_kept` and grows by `growth` rows, all alike or each so."""

    @abstractmethod
    def bound_bytes(self, kept_tokens: int, growth: int) -> int:
        """Bytes that suffice for any sequence whose layers and heads keep `kept_tokens` on average."""

    @abstractmethod
    def shareable(self, num_kept: Sequence[int]) -> tuple[int, ...]:
        """How many of each KV head's first rows several sequences can read in one place."""

    @abstractmethod
    def shared_bound_bytes(self, kept_tokens: int) -> int:
        """Bytes that suffice for what is shareable of `kept_tokens` tokens on average."""

    @abstractmethod
    def own_bound_bytes(self, growth: int) -> int:
        """Bytes that suffice for what each sequence needs beside it, with `growth` rows to come."""

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

    def hold(self, allocation: SomeAllocation) -> None:
        """One more will free it; its memory goes with the last of them."""
        self._more_holders[allocation] = self._more_holders.get(allocation, 0) + 1

    def holders(self, allocation: SomeAllocation) -> int:
        """How many must free it before its memory goes."""
        return 1 + self._more_holders.get(allocation, 0)

    def shrink(self, allocation: SomeAllocation, nbytes: int) -> SomeAllocation:
        """Gives back what is more than `nbytes`; the returned allocation replaces the old one, whoever holds it."""
        more = self._more_holders.pop(allocation, 0)
        smaller = self._shrink(allocation, nbytes)
        if more:
            self._more_holders[smaller] = more
        return smaller

    def free(self, allocation: SomeAllocation) -> None:
        """Gives an allocation back, which no thread of its holder's uses any more. Freeing it once more is a bug."""
        more = self._more_holders.pop(allocation, 0)
        if more > 1:
            self._more_holders[allocation] = more - 1
        if not more:
            self._free(allocation)

    @abstractmethod
    def _shrink(self, allocation: SomeAllocation, nbytes: int) -> SomeAllocation:
        """`shrink`, whoever holds it."""

    @abstractmethod
    def _free(self, allocation: SomeAllocation) -> None:
        """Gives an allocation back that nobody holds any more."""

    def install(
        self,
        allocation: SomeAllocation,
        num_kept: Sequence[int],
        body: memoryview,
        growth: int,
        eviction: RowLedger | None = None,
        seen: SeenRows | None = None,
        shared: SomeKV | None = None,
    ) -> SomeKV:
        """Copies a parcel body into memory of at least `sequence_bytes(num_kept, growth)`.

        Args:
            num_kept: Layer-major, one count per layer and KV head.
            body: As `KVLayout.sections` describes it; may be read-only.
            growth: Tokens to come.
            eviction: Copied, too; with it, memory of `sequence_bytes(num_kept, eviction.growth(growth))` is enough.
            seen: Needed where layers have windows.
            shared: Rows that come before those of `body` and are not counted in `num_kept`.
        """
        assert shared is None or eviction is None, "rows that others read must stay as they are"
        kv = self.place(allocation, num_kept, growth, eviction, seen, shared)
        self.fill(kv, body)
        return kv

    @abstractmethod
    def place(
        self,
        allocation: SomeAllocation,
        num_kept: Sequence[int],
        growth: int,
        eviction: RowLedger | None = None,
        seen: SeenRows | None = None,
        shared: SomeKV | None = None,
    ) -> SomeKV:
        """`install` without the rows, which `fill` brings."""

    @abstractmethod
    def fill(self, kv: SomeKV, body: memoryview) -> None:
        """Copies the rows of a parcel body to their places, which nobody reads yet."""

    @abstractmethod
    def export(self, kv: SomeKV) -> ExportedKV:
        """Copies a sequence out, appended tokens included; `install` brings it back bit by bit."""

    def attention(self, batch: Sequence[SomeKV]) -> LayerHook:
        """The attention of one step: appends each sequence's new token, then attends; one query per sequence."""
        dense = self._attention(batch)
        return RuledAttention(dense, batch, self) if any(kv.eviction for kv in batch) else dense

    def replay(self, steps: Sequence[SomeKV]) -> LayerHook:
        """As `attention`, of several steps of one sequence that evicts nothing; each has a row more than its last."""
        return RowsFirst(self._attention(steps))

    def complete(self, batch: Sequence[SomeKV]) -> None:
        """Ends a step: counts the new tokens and drops the rows that the sequences' evictions name."""
        for kv in batch:
            kv.appended += 1
            if kv.eviction is not None:
                for move in kv.eviction.step():
                    if kv.eviction.rule.merges:
                        merge_dropped(self, kv, kv.eviction, move)
                    self._move(kv, move)

    def free_room(self, num_kept: Sequence[int], growth: int, tokens: int, eviction: Growing | None) -> int:
        """All `tokens` where an eviction grows no further with them than without one by `growth`, else `growth`."""
        enough = self.sequence_bytes(num_kept, growth)
        return tokens if eviction and self.sequence_bytes(num_kept, eviction.growth(tokens)) <= enough else growth

    @abstractmethod
    def keys(self, kv: SomeKV, layer: int, number: int) -> torch.Tensor:
        """See `RowAccess`."""

    @abstractmethod
    def rows(self, kv: SomeKV, layer: int, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RowAccess`."""

    @abstractmethod
    def write(self, kv: SomeKV, layer: int, chosen: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """See `RowMemory`."""

    @abstractmethod
    def _attention(self, batch: Sequence[SomeKV]) -> StepAttention:
        """`attention` without evictions."""

    @abstractmethod
    def _move(self, kv: SomeKV, move: Move) -> None:
        """Copies rows onto those that are dropped; `kv.lengths` are those after it."""

    def check_integrity(self) -> None:
        """Asserts the conservation law."""
        assert all(more > 0 for more in self._more_holders.values()), "an allocation is held by fewer than one"
        assert all(map(self._is_allocated, self._more_holders)), "an allocation is free while someone holds it"
        self._check_memory()

    @abstractmethod
    def _is_allocated(self, allocation: SomeAllocation) -> bool:
        """Whether none of it is free."""

    @abstractmethod
    def _check_memory(self) -> None:
        """Asserts the conservation law of what was allocated."""


def capacities(num_kept: Sequence[int], growth: int | Sequence[int]) -> list[int]:
    """Rows of each KV head when it has grown by `growth`, all alike or each so."""
    if isinstance(growth, int):
        return [kept + growth for kept in num_kept]
    return [kept + more for kept, more in zip(num_kept, growth, strict=True)]


def growth_of(growth: int, eviction: Growing | None) -> int | list[int]:
    """Rows to come in `growth` tokens."""
    return growth if eviction is None else eviction.growth(growth)
