"""Writes plain KV rows as an encoded parcel body and reads them back; `shared/kv/encoding.py` says where bytes lie.

Asymmetric round to nearest, halves to even: zero = min and scale = (max - min) / (2^bits - 1) of a group, in fp16;
code = (value - zero) / scale and value' = zero + code * scale in fp32, with zero and scale as they are sent. Where the
scale is 0, all values of the group being about the same, so are the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shared.errors import InvalidRequestError
from shared.kv.encoding import EncodedLayer, Encoding, Field
from shared.kv.layout import KVLayout
from shared.model.spec import TORCH_DTYPES

FIELD_DTYPES = {**TORCH_DTYPES, "uint8": torch.uint8}
# Half of fp16's range: no zero, no scale and nothing restored from them can leave it.
MAX_MAGNITUDE = 32768.0

Fields = dict[str, torch.Tensor]


def fits(rows: torch.Tensor) -> bool:
    """Whether values [rows, head_dim] can be encoded: finite, and none beyond `MAX_MAGNITUDE`."""
    low, high = rows.aminmax()
    # a NaN makes both of them NaN
    return bool((low >= -MAX_MAGNITUDE) & (high <= MAX_MAGNITUDE))


@torch.inference_mode()
def encode(
    rows: torch.Tensor,
    layout: KVLayout,
    num_kept: Sequence[int],
    encoding: Encoding,
    channels: torch.Tensor | None,
    body: torch.Tensor,
) -> None:
    """Writes a body.

    Args:
        rows: [all rows, head_dim] in the order of `KVLayout.sections`; they must fit.
        num_kept: Layer-major, one count per layer and KV head.
        channels: [num_layers, num_kv_heads, head_dim] bool, `encoding.key_channels` true each; None sends all.
        body: [encoding.body_bytes(..)] uint8 on the rows' device.
    """
    for number, (layer, plain) in enumerate(_layers(rows, layout, num_kept, encoding)):
        fields, places = _fields(layer, body), _Places.of(layer, encoding.group, rows.device)
        keys, values = plain.chunk(2)
        torch.index_select(keys, 0, places.recent, out=fields["recent_keys"])
        torch.index_select(values, 0, places.recent, out=fields["recent_values"])
        keys, values = keys.index_select(0, places.older), values.index_select(0, places.older)
        if channels is not None:
            fields["channels"].copy_(pack_codes(channels[number].to(torch.uint8), 1))
            keys = keys.gather(1, _columns(channels[number], encoding)[places.head])
        if encoding.bits:
            _quantise_keys(keys, places, encoding, fields)
            _quantise_values(values, encoding, fields)
        else:
            fields["keys"].copy_(keys)
            fields["values"].copy_(values)
        body[max(field.end for field in layer.fields.values()) : layer.end] = 0


@torch.inference_mode()
def decode(
    body: torch.Tensor, layout: KVLayout, num_kept: Sequence[int], encoding: Encoding, rows: torch.Tensor
) -> None:
    """Reads a body whose size was checked.

    Args:
        body: [encoding.body_bytes(..)] uint8.
        rows: [all rows, head_dim] of the model's dtype, written in the order of `KVLayout.sections`.

    Raises:
        InvalidRequestError: It names another number of K channels than it sends.
    """
    for layer, plain in _layers(rows, layout, num_kept, encoding):
        fields, places = _fields(layer, body), _Places.of(layer, encoding.group, body.device)
        keys, values = plain.chunk(2)
        keys.index_copy_(0, places.recent, fields["recent_keys"])
        values.index_copy_(0, places.recent, fields["recent_values"])
        older_keys, older_values = fields["keys"], fields["values"]
        if encoding.bits:
            older_keys = _restored_keys(places, encoding, fields).to(rows.dtype)
            older_values = _restored_values(layout, encoding, fields).to(rows.dtype)
        if "channels" in fields:
            mask = unpack_codes(fields["channels"], layout.head_dim, 1) > 0
            sent, older_keys = older_keys, older_values.new_zeros(older_values.shape)
            older_keys.scatter_(1, _columns(mask, encoding)[places.head], sent)
        keys.index_copy_(0, places.older, older_keys)
        values.index_copy_(0, places.older, older_values)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, columns] uint8 as [rows, n] bytes: byte j holds the codes j, j + n .. from its lowest bits up."""
    per_byte = 8 // bits
    width = -(-codes.shape[1] // per_byte)
    parts = torch.nn.functional.pad(codes, (0, width * per_byte - codes.shape[1])).split(width, dim=1)
    packed = parts[0].clone()
    for number, part in enumerate(parts[1:], start=1):
        packed |= part << number * bits
    return packed


def unpack_codes(packed: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """The codes [rows, columns] uint8 of packed bytes."""
    parts = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=1)[:, :columns]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Places:
    """Which rows of a layer's plain K (or V), head after head, are what; all int64.

    Attributes:
        older: [older rows], rows that are encoded.
        recent: [recent rows], rows that stay as they are.
        head: [older rows], their KV heads.
        group: [older rows], their groups.
        members: [groups, group size], the older rows of each; the last one again where a group is smaller.
        slot: [older rows], where each is among the flattened members.
    """

    older: torch.Tensor
    recent: torch.Tensor
    head: torch.Tensor
    group: torch.Tensor
    members: torch.Tensor
    slot: torch.Tensor

    @classmethod
    def of(cls, layer: EncodedLayer, size: int, device: torch.device) -> _Places:
        older, recent = torch.tensor(layer.older), torch.tensor(layer.recent)
        end, groups = older.cumsum(0), -(-older // size)
        head = torch.arange(len(older)).repeat_interleave(older)
        row, begin = torch.arange(len(head)), (end - older)[head]
        group = (groups.cumsum(0) - groups)[head] + (row - begin) // size
        owner = torch.arange(len(older)).repeat_interleave(groups)
        first = row[(row - begin) % size == 0]
        places = {
            "older": row + (recent.cumsum(0) - recent)[head],
            "recent": torch.arange(int(recent.sum())) + end.repeat_interleave(recent),
            "head": head,
            "group": group,
            "members": torch.minimum(first[:, None] + torch.arange(size), end[owner][:, None] - 1),
            "slot": group * size + (row - begin) % size,
        }
        return cls(**{name: tensor.to(device) for name, tensor in places.items()})


def _layers(
    rows: torch.Tensor, layout: KVLayout, num_kept: Sequence[int], encoding: Encoding
) -> Iterator[tuple[EncodedLayer, torch.Tensor]]:
    """Each layer beside its plain rows, first all K, then all V."""
    end = 0
    for layer in encoding.layers(layout, num_kept):
        begin, end = end, end + 2 * (sum(layer.older) + sum(layer.recent))
        yield layer, rows[begin:end]


def _fields(layer: EncodedLayer, body: torch.Tensor) -> Fields:
    return {name: _view(field, body) for name, field in layer.fields.items()}


def _view(field: Field, body: torch.Tensor) -> torch.Tensor:
    return body[field.offset : field.end].view(FIELD_DTYPES[field.dtype]).view(field.rows, field.columns)


def _columns(channels: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """The channels that are sent of each KV head, [num_kv_heads, key_channels] int64, ascending."""
    if not bool((channels.sum(dim=1) == encoding.key_channels).all()):
        raise InvalidRequestError("another number of K channels than was announced", reason="PARCEL_ENCODING")
    return channels.nonzero()[:, 1].view(len(channels), encoding.key_channels)


def _quantise_keys(keys: torch.Tensor, places: _Places, encoding: Encoding, fields: Fields) -> None:
    """Per channel in groups of rows."""
    grouped = keys.index_select(0, places.members.flatten()).float().view(*places.members.shape, keys.shape[1])
    scales, zeros = _grid(grouped, encoding.bits, dim=1)
    fields["key_scales"].copy_(scales)
    fields["key_zeros"].copy_(zeros)
    codes = _codes(grouped, scales[:, None], zeros[:, None], encoding.bits)
    fields["keys"].copy_(pack_codes(codes.flatten(0, 1).index_select(0, places.slot), encoding.bits))


def _quantise_values(values: torch.Tensor, encoding: Encoding, fields: Fields) -> None:
    """Per row in groups of channels; the last channel again where a group is smaller."""
    head_dim, size = values.shape[1], min(encoding.group, values.shape[1])
    filled = torch.cat([values, values[:, -1:].expand(-1, -head_dim % size)], dim=1)
    grouped = filled.float().unflatten(1, (filled.shape[1] // size, size))
    scales, zeros = _grid(grouped, encoding.bits, dim=2)
    fields["value_scales"].copy_(scales)
    fields["value_zeros"].copy_(zeros)
    codes = _codes(grouped, scales[:, :, None], zeros[:, :, None], encoding.bits)
    fields["values"].copy_(pack_codes(codes.flatten(1)[:, :head_dim], encoding.bits))


def _grid(grouped: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of groups along `dim`, fp16."""
    # several times faster than aminmax
    low, high = grouped.amin(dim=dim), grouped.amax(dim=dim)
    return ((high - low) / ((1 << bits) - 1)).half(), low.half()


def _codes(grouped: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    steps = (grouped - zeros.float()) / scales.float().masked_fill_(scales == 0, torch.inf)
    return steps.round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)


def _restored_keys(places: _Places, encoding: Encoding, fields: Fields) -> torch.Tensor:
    codes = unpack_codes(fields["keys"], encoding.key_channels, encoding.bits)
    scales, zeros = (fields[name].float().index_select(0, places.group) for name in ("key_scales", "key_zeros"))
    return zeros.addcmul_(codes.float(), scales)


def _restored_values(layout: KVLayout, encoding: Encoding, fields: Fields) -> torch.Tensor:
    head_dim, size = layout.head_dim, min(encoding.group, layout.head_dim)
    codes = unpack_codes(fields["values"], head_dim, encoding.bits)
    filled = torch.nn.functional.pad(codes, (0, -head_dim % size)).float()
    grouped = filled.unflatten(1, (filled.shape[1] // size, size))
    scales, zeros = (fields[name].float()[:, :, None] for name in ("value_scales", "value_zeros"))
    return torch.addcmul(zeros, grouped, scales).flatten(1)[:, :head_dim]
