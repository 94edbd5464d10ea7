"""Byte arithmetic of a model's KV cache. All of it lives here; nothing else multiplies heads by bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlcache.worker.v1 import worker_pb2 as pb

from shared.errors import FailedPreconditionError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Far above any model, far below what would hurt: bounds what a manifest can make us compute.
LIMITS = (1024, 1024, 4096)  # layers, KV heads, head dim
# One that shows the query more than itself.
LEAST_WINDOW = 2
MAX_WINDOW = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Section:
    """K and V of one layer inside a parcel body; offsets in bytes from the start of the body."""

    layer: int
    rows: tuple[int, ...]
    """Kept tokens of each KV head."""
    key_offset: int
    value_offset: int
    end: int


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Shape of one token's KV: `num_layers` x (K, V) x [num_kv_heads, head_dim] of `dtype`."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    windows: tuple[int, ...] = ()
    """Of each layer how many tokens a query sees, itself included, 0 for all; empty where every layer sees all."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"unknown KV dtype {self.dtype!r}; known: {', '.join(ITEM_BYTES)}")
        shape = (self.num_layers, self.num_kv_heads, self.head_dim)
        if not all(1 <= size <= limit for size, limit in zip(shape, LIMITS, strict=True)):
            raise ValueError(f"impossible KV layout {shape}")
        if self.windows and (len(self.windows) != self.num_layers or not any(self.windows)):
            raise ValueError("windows belong to layers, one to each, or to none")
        if not all(window == 0 or LEAST_WINDOW <= window <= MAX_WINDOW for window in self.windows):
            raise ValueError(f"a window has between {LEAST_WINDOW} and {MAX_WINDOW} tokens")

    @property
    def row_bytes(self) -> int:
        """Bytes of one K (or V) row: one token, one KV head, one layer."""
        return self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers and heads, K and V."""
        return 2 * self.num_layers * self.num_kv_heads * self.row_bytes

    @property
    def windowed_layers(self) -> tuple[int, ...]:
        """Layers in which a query does not see every token before it."""
        return tuple(layer for layer, window in enumerate(self.windows) if window)

    def full_bytes(self, num_tokens: int) -> int:
        """Bytes of `num_tokens` uncompressed tokens."""
        return num_tokens * self.token_bytes

    def body_bytes(self, num_kept: Sequence[int]) -> int:
        """Bytes of a parcel body; `num_kept` is layer-major, one count per layer and KV head."""
        return 2 * self.row_bytes * sum(num_kept)

    def sections(self, num_kept: Sequence[int]) -> Iterator[Section]:
        """The layers of a parcel body in order.

        Body: for each layer the K rows of head 0, of head 1 ..., then the V rows in the same order.
        """
        offset = 0
        for layer in range(self.num_layers):
            rows = tuple(num_kept[layer * self.num_kv_heads : (layer + 1) * self.num_kv_heads])
            half = sum(rows) * self.row_bytes
            yield Section(layer=layer, rows=rows, key_offset=offset, value_offset=offset + half, end=offset + 2 * half)
            offset += 2 * half

    def realised_retention(self, num_kept: Sequence[int], prompt_tokens: int) -> float:
        """Kept share of the prompt's KV."""
        return sum(num_kept) / (self.num_layers * self.num_kv_heads * prompt_tokens)

    @classmethod
    def from_proto(cls, message: pb.KVLayout) -> KVLayout:
        """Reads a message.

        Raises:
            FailedPreconditionError: No model has such a layout.
        """
        try:
            return cls(
                num_layers=message.num_layers,
                num_kv_heads=message.num_kv_heads,
                head_dim=message.head_dim,
                dtype=message.dtype,
                windows=tuple(message.windows),
            )
        except ValueError as error:
            raise FailedPreconditionError(str(error), reason="KV_LAYOUT") from error

    def to_proto(self) -> pb.KVLayout:
        """The message that reads back as this layout."""
        return pb.KVLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            windows=self.windows,
        )
