"""Hand-made frames are protobuf, and damaged ones are refused."""

from __future__ import annotations

import contextlib

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from vlcache.worker.v1 import kv_pb2 as pb

from shared.errors import DataLossError, FailedPreconditionError, InvalidRequestError
from shared.kv.manifest import FORMAT_VERSION
from shared.kv.transport.frames import (
    CHUNK_BYTES,
    Chunk,
    decode_chunk,
    decode_first,
    decode_later,
    encode_chunk,
    encode_header,
    encode_opening,
    encode_trailer,
)

offsets = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 63).map(lambda power: 1 << power), st.integers(0, 300))
bodies = st.binary(max_size=300)
VARINT_EDGES = [0, 1, 127, 128, 16_383, 16_384, 2**21 - 1, 2**21, 2**32 - 1, 2**32, 2**63, 2**64 - 1]


@given(offsets, bodies)
def test_our_chunks_are_read_by_the_generated_code(offset: int, data: bytes) -> None:
    message = pb.PutKVRequest.FromString(encode_chunk(offset, memoryview(data)))
    assert message.WhichOneof("frame") == "chunk"
    assert (message.chunk.offset, message.chunk.data) == (offset, data)
    assert message.chunk.checksum == xxhash.xxh3_64_intdigest(data)


@given(offsets.filter(bool), bodies.filter(bool))
def test_chunks_of_the_generated_code_are_ours_to_the_byte(offset: int, data: bytes) -> None:
    """But for offset 0 and empty data, which we write and protobuf leaves out."""
    chunk = pb.KVChunk(offset=offset, checksum=xxhash.xxh3_64_intdigest(data), data=data)
    wire = pb.PutKVRequest(chunk=chunk).SerializeToString()
    assert wire == encode_chunk(offset, memoryview(data))
    read = decode_chunk(wire)
    assert (read.offset, bytes(read.data)) == (offset, data)


@pytest.mark.parametrize("offset", VARINT_EDGES)
@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_384])
def test_chunks_round_trip_where_varints_grow(offset: int, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    read = decode_chunk(encode_chunk(offset, memoryview(data)))
    assert (read.offset, bytes(read.data)) == (offset, data)


def test_the_data_of_a_chunk_is_a_view_into_the_message() -> None:
    message = encode_chunk(5, memoryview(bytes(CHUNK_BYTES)))
    read = decode_chunk(message)
    assert read.data.obj is message
    assert read.data.nbytes == CHUNK_BYTES
    assert len(message) - CHUNK_BYTES < 32


@given(st.binary(max_size=40), st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_headers_round_trip(token: bytes, model: str) -> None:
    header = decode_first(encode_header(token, pb.KVManifest(model=model, num_kept=[1, 2])))
    assert header == pb.PutKVHeader(token=token, manifest=pb.KVManifest(model=model, num_kept=[1, 2]))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_changed_data_byte_is_data_loss(data: bytes, draw: st.DataObject) -> None:
    message = bytearray(encode_chunk(7, memoryview(data)))
    message[len(message) - 1 - draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(DataLossError) as caught:
        decode_chunk(bytes(message))
    assert caught.value.reason == "CHUNK_CHECKSUM"


@given(st.binary(max_size=200), st.integers(0, 7), st.integers(1, 255))
def test_a_changed_checksum_is_data_loss(data: bytes, byte: int, flip: int) -> None:
    message = bytearray(encode_chunk(7, memoryview(data)))
    at = bytes(message).index(xxhash.xxh3_64_intdigest(data).to_bytes(8, "little"))
    message[at + byte] ^= flip
    with pytest.raises(DataLossError):
        decode_chunk(bytes(message))


@given(st.binary(max_size=40))
def test_openings_round_trip(token: bytes) -> None:
    assert decode_first(encode_opening(token)) == pb.PutKVOpening(token=token, format_version=FORMAT_VERSION)


@given(st.integers(0, 2**32 - 1).filter(lambda version: version != FORMAT_VERSION))
def test_an_opening_of_another_format_is_refused(version: int) -> None:
    opening = pb.PutKVRequest(opening=pb.PutKVOpening(token=b"t", format_version=version))
    with pytest.raises(FailedPreconditionError) as caught:
        decode_first(opening.SerializeToString())
    assert caught.value.reason == "PARCEL_FORMAT"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), offsets, bodies)
def test_trailers_and_chunks_are_told_apart(model: str, offset: int, data: bytes) -> None:
    manifest = pb.KVManifest(model=model, num_kept=[1, 2])
    assert decode_later(encode_trailer(manifest)) == pb.PutKVTrailer(manifest=manifest)
    chunk = decode_later(encode_chunk(offset, memoryview(data)))
    assert isinstance(chunk, Chunk)
    assert (chunk.offset, bytes(chunk.data)) == (offset, data)


@pytest.mark.parametrize("message", [b"", b"\xff", encode_opening(b"t"), encode_header(b"t", pb.KVManifest())])
def test_what_is_neither_chunk_nor_trailer_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        decode_later(message)


def check_refused_or_true(message: bytes) -> None:
    """A chunk that is accepted says what the generated code reads, with a true checksum."""
    try:
        read = decode_chunk(message)
    except (InvalidRequestError, DataLossError):
        return
    chunk = pb.PutKVRequest.FromString(message).chunk
    assert bytes(read.data) == chunk.data
    assert read.offset == chunk.offset
    assert chunk.checksum == xxhash.xxh3_64_intdigest(chunk.data)


@given(st.binary(max_size=80))
def test_garbage_is_never_a_chunk_that_protobuf_reads_otherwise(message: bytes) -> None:
    check_refused_or_true(message)


@given(offsets, st.binary(max_size=40), st.data())
@settings(max_examples=300)
def test_a_mutated_chunk_is_refused_or_true(offset: int, data: bytes, draw: st.DataObject) -> None:
    message = bytearray(encode_chunk(offset, memoryview(data)))
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, len(message) - 1))
        match draw.draw(st.sampled_from(["flip", "cut", "drop", "insert"])):
            case "flip":
                message[at] ^= draw.draw(st.integers(1, 255))
            case "cut":
                del message[max(1, at) :]
            case "drop" if len(message) > 1:
                del message[at]
            case "insert":
                message.insert(at, draw.draw(st.integers(0, 255)))
    check_refused_or_true(bytes(message))


def test_every_truncation_of_a_chunk_is_refused() -> None:
    message = encode_chunk(300, memoryview(b"some bytes"))
    for length in range(len(message)):
        with pytest.raises(InvalidRequestError):
            decode_chunk(message[:length])
    with pytest.raises(InvalidRequestError):
        decode_chunk(message + b"\0")


@pytest.mark.parametrize(
    "varint", [b"\xff" * 10 + b"\x01", b"\x80" * 200, b"\xff" * 9 + b"\x02", b"\xff" * 9 + b"\x7f"]
)
def test_an_offset_of_more_than_64_bits_is_refused(varint: bytes) -> None:
    inner = b"\x08" + varint + b"\x11" + xxhash.xxh3_64_intdigest(b"").to_bytes(8, "little") + b"\x1a\x00"
    length = (
        len(inner).to_bytes(1, "little") if len(inner) < 128 else bytes((len(inner) & 0x7F | 0x80, len(inner) >> 7))
    )
    with pytest.raises(InvalidRequestError):
        decode_chunk(b"\x12" + length + inner)


@given(st.binary(max_size=100))
def test_garbage_is_refused_as_a_header_or_read_like_protobuf(message: bytes) -> None:
    with contextlib.suppress(InvalidRequestError, FailedPreconditionError):
        first, read = decode_first(message), pb.PutKVRequest.FromString(message)
        assert first == (read.header if isinstance(first, pb.PutKVHeader) else read.opening)


@pytest.mark.parametrize("message", [b"", b"\xff", encode_chunk(0, memoryview(b"x")), encode_trailer(pb.KVManifest())])
def test_a_transfer_that_does_not_start_with_its_header_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        decode_first(message)
    with pytest.raises(InvalidRequestError):
        decode_chunk(encode_header(b"token", pb.KVManifest()))
