"""Damaged and foreign parcels: each is refused with its status, and the reservation stays as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vlcache.worker.v1 import kv_pb2

from decode_worker.answers import Stage
from decode_worker.worker import LoadedModel
from shared.kv.manifest import Manifest, TransferId
from shared.kv.transport.frames import encode_chunk, encode_header
from shared.request.sampling import Sampling
from tests.unit.decode_worker.serving import EPOCH, Served, failure, flipped, frames, run
from tests.unit.decode_worker.shipment import Shipment, answers


def with_changed_body(sent: list[bytes], shipment: Shipment) -> list[bytes]:
    """Right checksums of wrong bytes: only the digest can tell."""
    wrong = bytearray(shipment.body)
    wrong[len(wrong) // 2] ^= 1
    return [sent[0], *frames(b"", shipment.manifest(), wrong)[1:]]


CORRUPTIONS: dict[str, tuple[Any, str, str]] = {
    "a bit flipped on the way": (
        lambda sent, _: [*sent[:3], flipped(sent[3]), *sent[4:]],
        "DATA_LOSS",
        "CHUNK_CHECKSUM",
    ),
    "the last chunk missing": (lambda sent, _: sent[:-1], "DATA_LOSS", "PARCEL_TRUNCATED"),
    "no chunk": (lambda sent, _: sent[:1], "DATA_LOSS", "PARCEL_TRUNCATED"),
    "a chunk missing": (lambda sent, _: [*sent[:2], *sent[3:]], "INVALID_ARGUMENT", "TRANSFER_FRAME"),
    "a chunk twice": (lambda sent, _: [*sent[:2], *sent[1:]], "INVALID_ARGUMENT", "TRANSFER_FRAME"),
    "chunks swapped": (lambda sent, _: [sent[0], sent[2], sent[1], *sent[3:]], "INVALID_ARGUMENT", "TRANSFER_FRAME"),
    "a chunk too many": (
        lambda sent, shipment: [*sent, encode_chunk(len(shipment.body), memoryview(b"x"))],
        "INVALID_ARGUMENT",
        "TRANSFER_FRAME",
    ),
    "a last chunk too long": (
        lambda sent, shipment: [sent[0], encode_chunk(0, memoryview(bytes(shipment.body) + b"x"))],
        "INVALID_ARGUMENT",
        "TRANSFER_FRAME",
    ),
    "an offset beyond reason": (
        lambda sent, _: [sent[0], encode_chunk((1 << 63) - 1, memoryview(b"x"))],
        "INVALID_ARGUMENT",
        "TRANSFER_FRAME",
    ),
    "a second header": (lambda sent, _: [sent[0], *sent], "INVALID_ARGUMENT", "TRANSFER_FRAME"),
    "garbage for a chunk": (lambda sent, _: [*sent[:2], b"\xff" * 40], "INVALID_ARGUMENT", "TRANSFER_FRAME"),
    "an empty message": (lambda sent, _: [*sent[:2], b""], "INVALID_ARGUMENT", "TRANSFER_FRAME"),
    "other bytes than the digest's": (with_changed_body, "DATA_LOSS", "PARCEL_DIGEST"),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_damaged_parcel_is_refused_and_may_be_sent_again(loaded: LoadedModel, shipment: Shipment, what: str) -> None:
    damage, code, reason = CORRUPTIONS[what]

    async def body(served: Served) -> None:
        promise = await served.reserve()
        good = frames(promise.token, shipment.manifest(), shipment.body)
        error = await failure(served.put(damage(good, shipment)))
        assert (error.code, error.reason) == (code, reason)
        assert served.held.find(promise.token).stage is Stage.RESERVED
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        await served.put(good)
        await answers(served, promise.token, shipment)

    run(loaded, body)


def transfer(**changes: Any) -> dict[str, Any]:
    return {"transfer": TransferId(**({"request_id": "r", "attempt": 1, "prefill_epoch": EPOCH} | changes))}


def longer(manifest: Manifest) -> Manifest:
    """True to itself, but one token longer in every layer and head than the reservation."""
    num_kept = (41,) * len(manifest.num_kept)
    size = manifest.layout.body_bytes(num_kept)
    return dataclasses.replace(manifest, num_kept=num_kept, logical_length=99, body_bytes=size)


def sampling(max_new_tokens: int) -> dict[str, Any]:
    return {"sampling": Sampling(max_new_tokens=max_new_tokens)}


FOREIGN: dict[str, tuple[Any, str, str]] = {
    "another request": (
        lambda made: dataclasses.replace(made, **transfer(request_id="s")),
        "FAILED_PRECONDITION",
        "TRANSFER_ID",
    ),
    "another attempt": (
        lambda made: dataclasses.replace(made, **transfer(attempt=2)),
        "FAILED_PRECONDITION",
        "TRANSFER_ID",
    ),
    "another prefill worker": (
        lambda made: dataclasses.replace(made, **transfer(prefill_epoch="e")),
        "FAILED_PRECONDITION",
        "TRANSFER_ID",
    ),
    "another model": (
        lambda made: dataclasses.replace(made, compatibility="x"),
        "FAILED_PRECONDITION",
        "INCOMPATIBLE_PARCEL",
    ),
    "another layout": (
        lambda made: dataclasses.replace(
            made, layout=dataclasses.replace(made.layout, dtype="bfloat16"), body_bytes=made.body_bytes // 2
        ),
        "FAILED_PRECONDITION",
        "INCOMPATIBLE_PARCEL",
    ),
    "more kept tokens than reserved": (longer, "INVALID_ARGUMENT", "OVER_RESERVATION"),
    "more new tokens than reserved": (
        lambda made: dataclasses.replace(made, **sampling(9)),
        "INVALID_ARGUMENT",
        "OVER_RESERVATION",
    ),
    "nothing left to generate": (
        lambda made: dataclasses.replace(made, **sampling(1)),
        "INVALID_ARGUMENT",
        "NOTHING_TO_GENERATE",
    ),
    "a first token that does not exist": (
        lambda made: dataclasses.replace(made, generated=(1 << 31,)),
        "INVALID_ARGUMENT",
        "UNKNOWN_TOKEN",
    ),
    "sizes that disagree": (
        lambda made: dataclasses.replace(made, body_bytes=64),
        "INVALID_ARGUMENT",
        "PARCEL_MANIFEST",
    ),
    "a head that keeps nothing": (
        lambda made: dataclasses.replace(made, num_kept=(0, *made.num_kept[1:])),
        "INVALID_ARGUMENT",
        "PARCEL_MANIFEST",
    ),
    "a head too few": (
        lambda made: dataclasses.replace(made, num_kept=made.num_kept[1:]),
        "INVALID_ARGUMENT",
        "PARCEL_MANIFEST",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_parcel_that_was_not_promised_never_begins(loaded: LoadedModel, shipment: Shipment, what: str) -> None:
    change, code, reason = FOREIGN[what]

    async def body(served: Served) -> None:
        promise = await served.reserve()
        error = await failure(served.put(frames(promise.token, change(shipment.manifest()), shipment.body)))
        assert (error.code, error.reason) == (code, reason)
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        await served.put(frames(promise.token, shipment.manifest(), shipment.body))
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_a_transfer_must_begin_with_a_known_token(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        good = frames(promise.token, shipment.manifest(), shipment.body)
        stranger = encode_header(b"x" * 16, shipment.manifest().to_proto())
        newer = shipment.manifest().to_proto()
        newer.format_version = 2
        bare = kv_pb2.PutKVRequest(header=kv_pb2.PutKVHeader(token=promise.token)).SerializeToString()
        for sent, code in [
            ([], "INVALID_ARGUMENT"),
            ([b"\xff\xff"], "INVALID_ARGUMENT"),
            ([b""], "INVALID_ARGUMENT"),
            (good[1:], "INVALID_ARGUMENT"),
            ([stranger, *good[1:]], "NOT_FOUND"),
            ([bare], "FAILED_PRECONDITION"),
            ([encode_header(promise.token, newer)], "FAILED_PRECONDITION"),
        ]:
            assert (await failure(served.put(sent))).code == code
            assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        await served.put(good)
        await answers(served, promise.token, shipment)

    run(loaded, body)
