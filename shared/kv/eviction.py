"""What a decode worker drops, or leaves unread, while it generates: the decode-time part of a compression policy.

Values only, which travel in a parcel's manifest. What each kind does is in `decode_worker/eviction`. A row is the KV of
one token in one layer and KV head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from vlcache.worker.v1 import kv_pb2 as pb

from shared.errors import FailedPreconditionError
from shared.kv.layout import KVLayout

# An accumulated score is one fp32.
SCORE_BYTES = 4
MAX_TOKENS = 1 << 24
# Retentions travel as pairs of 64-bit numbers.
MAX_DENOMINATOR = (1 << 63) - 1
SCOPE_VARIANTS = ("slide", "adaptive", "discontinuous")


@dataclass(frozen=True, kw_only=True)
class Eviction(ABC):
    """One kind and its numbers. `carries_scores`: each kept row brings a score. `evicts`: rows are dropped."""

    carries_scores: ClassVar[bool] = False
    evicts: ClassVar[bool] = True

    @property
    def empty_layers(self) -> frozenset[int]:
        """Layers without a row of their own, of the prompt or of the answer."""
        return frozenset()

    @property
    def digested(self) -> bytes:
        """What a parcel's digest covers of it: what says whose rows are read."""
        return b""

    @abstractmethod
    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """Compares the numbers with each other and with a parcel's kept rows, layer-major.

        Raises:
            ValueError: They make no sense.
        """

    @abstractmethod
    def to_proto(self) -> pb.Eviction:
        """The message that reads back as this value."""


@dataclass(frozen=True, kw_only=True)
class FixedSlot(Eviction):
    """Elastic Cache: one place of the cache is dropped whenever a layer holds more than its share of all tokens.

    `retention` per layer; the place is `distance` (negative) after the kept prompt's end, or its middle.
    """

    retention: tuple[Fraction, ...]
    distance: int

    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """See `Eviction`."""
        _check_retention(self.retention, layout)
        _require(-MAX_TOKENS <= self.distance < 0, "distance out of range")

    def to_proto(self) -> pb.Eviction:
        """See `Eviction`."""
        message = pb.Eviction.FixedSlot(retention=_shares_to_proto(self.retention), distance=self.distance)
        return pb.Eviction(fixed_slot=message)


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(Eviction):
    """H2O: `budget` rows per layer and head, of which the last `recent` stay; the least attended other one goes."""

    carries_scores: ClassVar[bool] = True

    budget: int
    recent: int

    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """See `Eviction`."""
        _require(0 <= self.recent <= self.budget <= MAX_TOKENS, "recent rows or budget out of range")
        _require(max(num_kept) <= self.budget, "more rows were kept than the budget allows")

    def to_proto(self) -> pb.Eviction:
        """See `Eviction`."""
        return pb.Eviction(heavy_hitters=pb.Eviction.HeavyHitters(budget=self.budget, recent=self.recent))


@dataclass(frozen=True, kw_only=True)
class Recall(Eviction):
    """D2O: heavy hitters with a budget per layer, whose heads hold equally many; what goes may join a row that stays.

    Of each layer's `budget` rows the last `recent` stay, and so do the first `sinks`.
    """

    carries_scores: ClassVar[bool] = True

    budget: tuple[int, ...]
    recent: tuple[int, ...]
    sinks: int

    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """See `Eviction`."""
        _require(len(self.budget) == len(self.recent) == layout.num_layers, "one budget per layer is needed")
        kept = _by_layer(num_kept, layout.num_kv_heads)
        for budget, recent, heads in zip(self.budget, self.recent, kept, strict=True):
            _require(recent >= 0 and recent + self.sinks < budget <= MAX_TOKENS, "recent rows or budget out of range")
            _require(max(heads) <= budget, "more rows were kept than the budget allows")
            _require(len(set(heads)) == 1, "heads of a layer must hold equally many rows")
        _require(self.sinks >= 0, "sinks out of range")

    def to_proto(self) -> pb.Eviction:
        """See `Eviction`."""
        return pb.Eviction(recall=pb.Eviction.Recall(budget=self.budget, recent=self.recent, sinks=self.sinks))


@dataclass(frozen=True, kw_only=True)
class Scope(Eviction):
    """SCOPE: the prompt's rows stay; generated ones have a budget of `window` rows, the last `recent` among them."""

    variant: str
    window: int
    recent: int
    delta: int

    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """See `Eviction`."""
        _require(self.variant in SCOPE_VARIANTS, "unknown variant")
        _require(1 <= self.recent <= self.window <= MAX_TOKENS, "recent rows or window out of range")
        _require(1 <= self.delta <= MAX_TOKENS, "delta out of range")

    def to_proto(self) -> pb.Eviction:
        """See `Eviction`."""
        message = pb.Eviction.Scope(variant=self.variant, window=self.window, recent=self.recent, delta=self.delta)
        return pb.Eviction(scope=message)


@dataclass(frozen=True, kw_only=True)
class TextGuard(Eviction):
    """TGV-KV: beyond a layer's share of all tokens the row goes that the current token attends to least.

    The first `sinks` rows and as many of the last as there were kept tokens of text after the image (`text`, per
    layer) stay. The heads of a layer drop the same tokens.
    """

    retention: tuple[Fraction, ...]
    sinks: int
    text: tuple[int, ...]

    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """See `Eviction`."""
        _check_retention(self.retention, layout)
        _require(0 <= self.sinks <= MAX_TOKENS, "sinks out of range")
        _require(len(self.text) == layout.num_layers, "one count of text tokens per layer is needed")
        _require(all(0 <= count <= MAX_TOKENS for count in self.text), "a count of text tokens is out of range")
        heads = layout.num_kv_heads
        _require(all(len(set(kept)) == 1 for kept in _by_layer(num_kept, heads)), "heads that differ share no places")

    def to_proto(self) -> pb.Eviction:
        """See `Eviction`."""
        shares = _shares_to_proto(self.retention)
        return pb.Eviction(text_guard=pb.Eviction.TextGuard(retention=shares, sinks=self.sinks, text=self.text))


@dataclass(frozen=True, kw_only=True)
class SparseRead(Eviction):
    """TidalDecode: nothing goes, but few rows are read.

    Layers before the first of `select_layers`, and these, read everything; all others only the `top` rows per KV head
    that the last of these before them attended to most.
    """

    evicts: ClassVar[bool] = False

    select_layers: tuple[int, ...]
    top: int

    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """See `Eviction`."""
        layers = self.select_layers
        _require(0 < len(layers) <= layout.num_layers, "as many layers can select as there are")
        _require(list(layers) == sorted(set(layers)), "layers that select must ascend")
        _require(1 <= self.top <= MAX_TOKENS, "top out of range")
        _require(len(set(num_kept)) == 1, "a row must be the same token in every layer and head")

    def to_proto(self) -> pb.Eviction:
        """See `Eviction`."""
        return pb.Eviction(sparse_read=pb.Eviction.SparseRead(select_layers=self.select_layers, top=self.top))


@dataclass(frozen=True, kw_only=True)
class SharedLayers(Eviction):
    """KVSharer: nothing goes, but `borrowers` have no rows: each reads those of the layer below that `lenders` says.

    They ascend. A layer that borrows does not lend, so what is read is always there.
    """

    evicts: ClassVar[bool] = False

    borrowers: tuple[int, ...]
    lenders: tuple[int, ...]

    @property
    def empty_layers(self) -> frozenset[int]:
        """See `Eviction`."""
        return frozenset(self.borrowers)

    @property
    def digested(self) -> bytes:
        """See `Eviction`; each layer that borrows, then its lender, as 4 bytes."""
        pairs = zip(self.borrowers, self.lenders, strict=True)
        return b"".join(layer.to_bytes(4, "little") for pair in pairs for layer in pair)

    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """See `Eviction`."""
        _require(0 < len(self.borrowers) == len(self.lenders), "one lender per borrowing layer is needed")
        _require(list(self.borrowers) == sorted(self.empty_layers), "borrowing layers must ascend")
        _require(self.borrowers[-1] < layout.num_layers, "a borrowing layer does not exist")
        pairs = zip(self.lenders, self.borrowers, strict=True)
        _require(all(0 <= lender < borrower for lender, borrower in pairs), "a lender must lie below its borrower")
        _require(self.empty_layers.isdisjoint(self.lenders), "a layer that borrows cannot lend")
        kept = _by_layer(num_kept, layout.num_kv_heads)
        _require(not any(count for layer in self.borrowers for count in kept[layer]), "a borrowing layer keeps rows")

    def to_proto(self) -> pb.Eviction:
        """See `Eviction`."""
        message = pb.Eviction.SharedLayers(borrowers=self.borrowers, lenders=self.lenders)
        return pb.Eviction(shared_layers=message)


def eviction_from_proto(message: pb.Eviction) -> Eviction:
    """Reads a message; `Eviction.check` says whether it makes sense.

    Raises:
        FailedPreconditionError: A kind that this version does not know.
        ValueError: A share has no denominator.
    """
    kind = message.WhichOneof("kind")
    if kind == "fixed_slot":
        slot = message.fixed_slot
        return FixedSlot(retention=_shares_from_proto(slot.retention), distance=slot.distance)
    if kind == "heavy_hitters":
        return HeavyHitters(budget=message.heavy_hitters.budget, recent=message.heavy_hitters.recent)
    if kind == "scope":
        scope = message.scope
        return Scope(variant=scope.variant, window=scope.window, recent=scope.recent, delta=scope.delta)
    if kind == "text_guard":
        guard = message.text_guard
        return TextGuard(retention=_shares_from_proto(guard.retention), sinks=guard.sinks, text=tuple(guard.text))
    if kind == "sparse_read":
        return SparseRead(select_layers=tuple(message.sparse_read.select_layers), top=message.sparse_read.top)
    if kind == "recall":
        recall = message.recall
        return Recall(budget=tuple(recall.budget), recent=tuple(recall.recent), sinks=recall.sinks)
    if kind == "shared_layers":
        shared = message.shared_layers
        return SharedLayers(borrowers=tuple(shared.borrowers), lenders=tuple(shared.lenders))
    raise FailedPreconditionError("unknown kind of eviction", reason="PARCEL_EVICTION")


def share_that_travels(retention: Fraction) -> Fraction:
    """The retention, or its nearest neighbour where 64 bits do not hold it."""
    return retention.limit_denominator(MAX_DENOMINATOR)


def _by_layer(num_kept: Sequence[int], heads: int) -> list[Sequence[int]]:
    return [num_kept[first : first + heads] for first in range(0, len(num_kept), heads)]


def _check_retention(retention: Sequence[Fraction], layout: KVLayout) -> None:
    _require(len(retention) == layout.num_layers, "one retention per layer is needed")
    _require(all(0 <= share <= 1 for share in retention), "a retention lies in [0, 1]")


def _shares_to_proto(retention: Sequence[Fraction]) -> list[pb.Eviction.Share]:
    return [pb.Eviction.Share(numerator=share.numerator, denominator=share.denominator) for share in retention]


def _shares_from_proto(shares: Sequence[pb.Eviction.Share]) -> tuple[Fraction, ...]:
    _require(all(share.denominator for share in shares), "a share has no denominator")
    return tuple(Fraction(share.numerator, share.denominator) for share in shares)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
