"""Hand-framed `PutKVRequest` messages.

The wire bytes are those of protobuf, but a chunk is built with one join and read without a copy: 0.97 of a bare
grpcio stream, where the generated code reaches 0.84.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash
from vlcache.worker.v1 import kv_pb2 as pb

from shared.errors import DataLossError, InvalidRequestError
from shared.kv.manifest import FORMAT_VERSION, check_format

# Half as much costs nearly a tenth more CPU time; 2 MiB gains 2 %, but the tokens of other requests wait longer.
CHUNK_BYTES = 3 << 19

# PutKVRequest.chunk = 2, length-delimited; KVChunk: offset = 1 varint, checksum = 2 fixed64, data = 3 bytes.
_TAG_CHUNK, _TAG_OFFSET, _TAG_CHECKSUM, _TAG_DATA = 0x12, 0x08, 0x11, 0x1A
_CHUNK = bytes((_TAG_CHUNK,))


@dataclass(frozen=True)
class Chunk:
    """A checked piece of a parcel body; `data` is a view into the received message."""

    offset: int
    data: memoryview


def encode_header(token: bytes, manifest: pb.KVManifest) -> bytes:
    """The first message of a transfer."""
    return pb.PutKVRequest(header=pb.PutKVHeader(token=token, manifest=manifest)).SerializeToString()


def encode_opening(token: bytes) -> bytes:
    """The first message of a transfer that begins while the parcel is being made."""
    opening = pb.PutKVOpening(token=token, format_version=FORMAT_VERSION)
    return pb.PutKVRequest(opening=opening).SerializeToString()


def encode_trailer(manifest: pb.KVManifest) -> bytes:
    """The last message of such a transfer."""
    return pb.PutKVRequest(trailer=pb.PutKVTrailer(manifest=manifest)).SerializeToString()


def encode_chunk(offset: int, data: memoryview) -> bytes:
    """A later message: `data` goes to `offset` of the body."""
    checksum = xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
    inner = b"".join(
        (
            bytes((_TAG_OFFSET,)),
            _varint(offset),
            bytes((_TAG_CHECKSUM,)),
            checksum,
            bytes((_TAG_DATA,)),
            _varint(len(data)),
        )
    )
    return b"".join((_CHUNK, _varint(len(inner) + len(data)), inner, data))


def decode_first(message: bytes) -> pb.PutKVHeader | pb.PutKVOpening:
    """Reads the first message.

    Raises:
        InvalidRequestError: It is something else.
        FailedPreconditionError: It opens a parcel of another format.
    """
    request = _parse(message, "unreadable transfer header")
    if request.HasField("header"):
        return request.header
    if not request.HasField("opening"):
        raise InvalidRequestError("a transfer starts with its header", reason="TRANSFER_FRAME")
    check_format(request.opening.format_version)
    return request.opening


def decode_later(message: bytes) -> Chunk | pb.PutKVTrailer:
    """Reads a later message of a transfer that began while the parcel was being made.

    Raises:
        InvalidRequestError: It is neither a chunk nor the trailer.
        DataLossError: The checksum does not match.
    """
    if message[:1] == _CHUNK:
        return decode_chunk(message)
    request = _parse(message, "unreadable transfer trailer")
    if not request.HasField("trailer"):
        raise InvalidRequestError("chunks are followed by a trailer", reason="TRANSFER_FRAME")
    return request.trailer


def decode_chunk(message: bytes) -> Chunk:
    """Reads and verifies a later message.

    Raises:
        InvalidRequestError: It is no chunk.
        DataLossError: The checksum does not match.
    """
    view = memoryview(message)
    try:
        offset, checksum, data = _parse_chunk(view)
    except (IndexError, ValueError) as error:
        raise InvalidRequestError("unreadable transfer chunk", reason="TRANSFER_FRAME") from error
    if xxhash.xxh3_64_intdigest(data) != checksum:
        raise DataLossError("a chunk's checksum does not match its bytes", reason="CHUNK_CHECKSUM")
    return Chunk(offset, data)


def _parse(message: bytes, refusal: str) -> pb.PutKVRequest:
    try:
        return pb.PutKVRequest.FromString(message)
    except Exception as error:
        raise InvalidRequestError(refusal, reason="TRANSFER_FRAME") from error


def _parse_chunk(view: memoryview) -> tuple[int, int, memoryview]:
    """Our own encoder's field order only; offset 0 is written out, so every field is present."""
    length, at = _expect_varint(view, 0, _TAG_CHUNK)
    if at + length != len(view):
        raise ValueError("length")
    offset, at = _expect_varint(view, at, _TAG_OFFSET)
    if view[at] != _TAG_CHECKSUM:
        raise ValueError("checksum")
    checksum = int.from_bytes(view[at + 1 : at + 9], "little")
    nbytes, at = _expect_varint(view, at + 9, _TAG_DATA)
    if at + nbytes != len(view):
        raise ValueError("data")
    return offset, checksum, view[at:]


def _expect_varint(view: memoryview, at: int, tag: int) -> tuple[int, int]:
    if view[at] != tag:
        raise ValueError("tag")
    value, shift = 0, 0
    while True:
        at += 1
        value |= (view[at] & 0x7F) << shift
        if shift > 63 or value >> 64:
            raise ValueError("varint")
        if view[at] < 0x80:
            return value, at + 1
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
