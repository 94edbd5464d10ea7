"""Where the bytes of an encoded parcel body lie: K and V quantised (KIVI), fewer channels of K (ThinK), or both.

Without torch; `shared/model/kv_codec.py` writes and reads the values. Policies: KIVI (Liu et al., ICML 2024, arXiv
2402.02750), ThinK (Xu et al., ICLR 2025, arXiv 2407.21018).

The last `residual` rows of each KV head stay as they are. Of the older ones K is quantised per channel in groups of
`group` rows, V per row in groups of `group` channels; a group at the end may be smaller. Body, layer after layer:

    recent_keys, recent_values  the recent rows of all heads, in the model's dtype
    keys, values                the older rows of all heads: codes, or values in the model's dtype when bits = 0
    key_scales, key_zeros       float16, a row per group of each head; only with codes, and before them
    value_scales, value_zeros   float16, a row per older row; only with codes, and before them
    channels                    codes of one bit, a row per head: which K channels are sent; only when some are not

A row of codes takes whole bytes: byte j of n holds the codes j, j + n, j + 2n .. from its lowest bits up. Zero bytes
fill each layer up to a multiple of 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from vlcache.worker.v1 import kv_pb2 as pb

from shared.errors import InvalidRequestError
from shared.kv.layout import ITEM_BYTES, KVLayout
from shared.request.params import WIRE_BITS, WIRE_GROUPS, Wire

FIELD_BYTES = {**ITEM_BYTES, "uint8": 1}
ALIGNMENT = 4


@dataclass(frozen=True)
class Field:
    """A matrix inside a body, row after row, `offset` bytes from the body's start."""

    offset: int
    rows: int
    columns: int
    dtype: str

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.offset + self.rows * self.columns * FIELD_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class EncodedLayer:
    """One layer of an encoded body.

    Attributes:
        older: Rows of each KV head that are encoded; its first ones.
        recent: Rows of each KV head that stay as they are; its last ones.
        fields: By the names in the module's text.
    """

    older: tuple[int, ...]
    recent: tuple[int, ...]
    fields: Mapping[str, Field]
    end: int


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a body is encoded. `key_channels` counts the K channels that are sent of each KV head."""

    bits: int
    group: int
    residual: int
    key_channels: int

    def __post_init__(self) -> None:
        _require(self.bits in WIRE_BITS, f"{self.bits} bits per value")
        _require(WIRE_GROUPS[0] <= self.group <= WIRE_GROUPS[1], f"groups of {self.group}")
        _require(self.residual >= 0, f"a residual of {self.residual}")
        _require(self.key_channels >= 1, "no K channel")

    @classmethod
    def asked_for(cls, wire: Wire, layout: KVLayout, num_kept: Sequence[int]) -> Encoding | None:
        """What a request means for a parcel; None when it wants plain values, or these would not become fewer bytes."""
        if wire.plain:
            return None
        # exact: 0.07 of 100 channels are 7, not 8
        channels = math.ceil(Fraction(str(wire.key_channels)) * layout.head_dim)
        encoding = cls(bits=wire.bits, group=wire.group, residual=wire.residual, key_channels=channels)
        return encoding if encoding.body_bytes(layout, num_kept) < layout.body_bytes(num_kept) else None

    def check(self, layout: KVLayout, num_kept: Sequence[int]) -> None:
        """Compares with a parcel.

        Raises:
            InvalidRequestError: It cannot be the encoding of such a parcel.
        """
        _require(self.key_channels <= layout.head_dim, "more K channels than there are")
        # what is received is bounded by what was reserved
        _require(self.body_bytes(layout, num_kept) < layout.body_bytes(num_kept), "the plain body is no larger")

    def body_bytes(self, layout: KVLayout, num_kept: Sequence[int]) -> int:
        """Bytes of the body; `num_kept` is layer-major, one count per layer and KV head."""
        end = 0
        for layer in self.layers(layout, num_kept):
            end = layer.end
        return end

    def layers(self, layout: KVLayout, num_kept: Sequence[int]) -> Iterator[EncodedLayer]:
        """The layers of the body in order."""
        offset, heads = 0, layout.num_kv_heads
        for first in range(0, layout.num_layers * heads, heads):
            layer = self._layer(layout, num_kept[first : first + heads], offset)
            yield layer
            offset = layer.end

    def _layer(self, layout: KVLayout, num_kept: Sequence[int], offset: int) -> EncodedLayer:
        recent = tuple(min(kept, self.residual) for kept in num_kept)
        older = tuple(kept - last for kept, last in zip(num_kept, recent, strict=True))
        fields: dict[str, Field] = {}
        end = offset
        for name, rows, columns, dtype in self._shapes(layout, older, sum(recent)):
            fields[name] = Field(end, rows, columns, dtype)
            end = fields[name].end
        return EncodedLayer(older=older, recent=recent, fields=fields, end=-(-end // ALIGNMENT) * ALIGNMENT)

    def _shapes(self, layout: KVLayout, older: Sequence[int], recent: int) -> Iterator[tuple[str, int, int, str]]:
        """Wide items first, so that each lies on a multiple of its own size."""
        rows, head_dim, channels = sum(older), layout.head_dim, self.key_channels
        yield "recent_keys", recent, head_dim, layout.dtype
        yield "recent_values", recent, head_dim, layout.dtype
        if self.bits:
            groups = sum(-(-count // self.group) for count in older)
            for name in ("key_scales", "key_zeros"):
                yield name, groups, channels, "float16"
            for name in ("value_scales", "value_zeros"):
                yield name, rows, -(-head_dim // self.group), "float16"
            yield "keys", rows, self.code_bytes(channels), "uint8"
            yield "values", rows, self.code_bytes(head_dim), "uint8"
        else:
            yield "keys", rows, channels, layout.dtype
            yield "values", rows, head_dim, layout.dtype
        if channels < head_dim:
            yield "channels", len(older), -(-head_dim // 8), "uint8"

    def code_bytes(self, columns: int) -> int:
        """Bytes of a row of codes."""
        return -(-columns * self.bits // 8)

    @classmethod
    def from_proto(cls, message: pb.KVEncoding) -> Encoding:
        """Reads a message.

        Raises:
            InvalidRequestError: Nothing is encoded so.
        """
        return cls(bits=message.bits, group=message.group, residual=message.residual, key_channels=message.key_channels)

    def to_proto(self) -> pb.KVEncoding:
        """The message that reads back as this encoding."""
        return pb.KVEncoding(bits=self.bits, group=self.group, residual=self.residual, key_channels=self.key_channels)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(f"bad parcel encoding: {message}", reason="PARCEL_ENCODING")
