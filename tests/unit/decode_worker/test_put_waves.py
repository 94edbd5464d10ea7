"""Parcels that begin to arrive before they are complete: installed whole and bit-identical, or not at all."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from decode_worker.answers import Stage
from decode_worker.worker import LoadedModel
from shared.kv.encoding import Encoding
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest, body_digest
from shared.kv.transport.frames import encode_chunk, encode_header, encode_opening, encode_trailer
from shared.kv.waves import LAST_WAVE
from tests.unit.decode_worker.serving import Served, failure, flipped, frames, run, until
from tests.unit.decode_worker.shipment import Shipment, answers
from tests.unit.decode_worker.waves import chunks, random_waves, travelling, wave_frames, with_data


def installed(served: Served, token: bytes) -> tuple[tuple[int, ...], bytes]:
    """Counts and KV of a sequence, as the pool gives them out."""
    (answer,) = served.held.find(token).answers.values()
    assert answer.sequence is not None
    kv = served.worker.runner._pool.export(answer.sequence.kv)
    return kv.num_kept, bytes(kv.body)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("waves", [1, 4, LAST_WAVE])
def test_a_parcel_in_waves_is_installed(loaded: LoadedModel, shipment: Shipment, chunk: int, waves: int) -> None:
    async def body(served: Served) -> None:
        promise, manifest = await served.reserve(), shipment.manifest()
        numbers = random_waves(manifest, waves=waves, seed=waves)
        await served.put(wave_frames(promise.token, manifest, shipment.body, numbers, chunk))
        kept, rows = installed(served, promise.token)
        assert (list(kept), rows) == (shipment.num_kept, bytes(shipment.body))
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_all_rows_may_leave_early_or_none(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        manifest = shipment.manifest()
        for name, number in (("a", 0), ("b", LAST_WAVE), ("c", 7)):
            promise = await served.reserve(request_id=name)
            waves = bytes([number]) * sum(manifest.num_kept)
            await served.put(wave_frames(promise.token, shipment.manifest(name), shipment.body, waves))
            assert installed(served, promise.token)[1] == bytes(shipment.body)
            served.worker.runner.end_all(served.held.find(promise.token))
        await served.nothing_is_held()

    run(loaded, body)


def test_what_has_come_counts_as_filling_until_the_trailer(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        good = wave_frames(promise.token, shipment.manifest(), shipment.body)
        slow = served.open_put()
        for frame in good[:-1]:
            await slow.write(frame)
        await until(lambda: served.held_bytes() == {"filling": promise.reserved_bytes})
        error = await failure(served.put(good))
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "ALREADY_COMMITTED")
        assert served.held.find(promise.token).stage is Stage.FILLING
        await slow.write(good[-1])
        await slow.done_writing()
        await slow
        await answers(served, promise.token, shipment)

    run(loaded, body)


def wrong_body(sent: list[bytes], shipment: Shipment) -> list[bytes]:
    """Right checksums of wrong rows."""
    manifest, wrong = shipment.manifest(), bytearray(shipment.body)
    wrong[0] ^= 1
    return with_data(sent, travelling(manifest, wrong, random_waves(manifest)))


def other_order(sent: list[bytes], shipment: Shipment) -> list[bytes]:
    """The rows as they were sent, under other waves."""
    manifest = shipment.manifest()
    data = travelling(manifest, shipment.body, random_waves(manifest))
    return with_data(sent, data[: manifest.body_bytes] + random_waves(manifest, seed=1))


def a_row_twice(sent: list[bytes], shipment: Shipment) -> list[bytes]:
    """In the place of another one."""
    manifest = shipment.manifest()
    size, data = manifest.layout.row_bytes, travelling(manifest, shipment.body, random_waves(manifest))
    return with_data(sent, data[:size] + data[:size] + data[2 * size :])


def trailer_of(manifest: Manifest) -> bytes:
    return encode_trailer(manifest.to_proto())


def recounted(shipment: Shipment, change: int) -> Manifest:
    """A trailer that is true to itself, with other counts in its first head."""
    manifest = shipment.manifest()
    num_kept = (manifest.num_kept[0] + change, *manifest.num_kept[1:])
    return dataclasses.replace(manifest, num_kept=num_kept, body_bytes=manifest.layout.body_bytes(num_kept))


def swapped(shipment: Shipment) -> Manifest:
    """As many rows, but in other layers."""
    manifest = shipment.manifest()
    first, second, third, *rest = manifest.num_kept
    assert first != third
    return dataclasses.replace(manifest, num_kept=(third, second, first, *rest))


def encoded(shipment: Shipment) -> Manifest:
    manifest = shipment.manifest()
    coded = Encoding(bits=2, group=8, residual=0, key_channels=manifest.layout.head_dim)
    return dataclasses.replace(
        manifest, encoding=coded, body_bytes=coded.body_bytes(manifest.layout, manifest.num_kept)
    )


DATA_LOSS, INVALID = "DATA_LOSS", "INVALID_ARGUMENT"
DAMAGES: dict[str, tuple[Any, str, str]] = {
    "a bit flipped in an early chunk": (
        lambda sent, _: [sent[0], flipped(sent[1]), *sent[2:]],
        DATA_LOSS,
        "CHUNK_CHECKSUM",
    ),
    "no trailer": (lambda sent, _: sent[:-1], DATA_LOSS, "PARCEL_TRUNCATED"),
    "nothing but an opening": (lambda sent, _: sent[:1], DATA_LOSS, "PARCEL_TRUNCATED"),
    "the last chunk missing": (lambda sent, _: [*sent[:-2], sent[-1]], INVALID, "TRANSFER_FRAME"),
    "no chunk": (lambda sent, _: [sent[0], sent[-1]], INVALID, "TRANSFER_FRAME"),
    "a chunk missing": (lambda sent, _: [*sent[:2], *sent[3:]], INVALID, "TRANSFER_FRAME"),
    "a chunk twice": (lambda sent, _: [*sent[:2], *sent[1:]], INVALID, "TRANSFER_FRAME"),
    "chunks swapped": (lambda sent, _: [sent[0], sent[2], sent[1], *sent[3:]], INVALID, "TRANSFER_FRAME"),
    "a row too many": (
        lambda sent, shipment: with_data(
            sent, travelling(shipment.manifest(), shipment.body, random_waves(shipment.manifest())) + bytes(65)
        ),
        INVALID,
        "TRANSFER_FRAME",
    ),
    "an offset beyond reason": (
        lambda sent, _: [sent[0], encode_chunk((1 << 63) - 1, memoryview(b"x")), sent[-1]],
        INVALID,
        "TRANSFER_FRAME",
    ),
    "a chunk after the trailer": (
        lambda sent, _: [*sent, encode_chunk(0, memoryview(b"x"))],
        INVALID,
        "TRANSFER_FRAME",
    ),
    "a second trailer": (lambda sent, _: [*sent, sent[-1]], INVALID, "TRANSFER_FRAME"),
    "a second opening": (lambda sent, _: [sent[0], *sent], INVALID, "TRANSFER_FRAME"),
    "a header in between": (
        lambda sent, shipment: [
            sent[0],
            encode_header(b"", shipment.manifest().to_proto()),
            *sent[1:],
        ],
        INVALID,
        "TRANSFER_FRAME",
    ),
    "garbage": (lambda sent, _: [*sent[:2], b"\xff" * 40, *sent[2:]], INVALID, "TRANSFER_FRAME"),
    "an empty message": (lambda sent, _: [*sent[:2], b"", *sent[2:]], INVALID, "TRANSFER_FRAME"),
    "other rows than the digest's": (wrong_body, DATA_LOSS, "PARCEL_DIGEST"),
    "rows in another order": (other_order, DATA_LOSS, "PARCEL_DIGEST"),
    "a row twice": (a_row_twice, DATA_LOSS, "PARCEL_DIGEST"),
    "a count too large": (
        lambda sent, shipment: [*sent[:-1], trailer_of(recounted(shipment, 1))],
        INVALID,
        "TRANSFER_FRAME",
    ),
    "a count too small": (
        lambda sent, shipment: [*sent[:-1], trailer_of(recounted(shipment, -1))],
        INVALID,
        "TRANSFER_FRAME",
    ),
    "counts swapped": (
        lambda sent, shipment: [*sent[:-1], trailer_of(swapped(shipment))],
        DATA_LOSS,
        "PARCEL_DIGEST",
    ),
    "a trailer of encoded rows": (
        lambda sent, shipment: [*sent[:-1], trailer_of(encoded(shipment))],
        INVALID,
        "TRANSFER_FRAME",
    ),
    "a trailer that contradicts itself": (
        lambda sent, shipment: [*sent[:-1], trailer_of(dataclasses.replace(shipment.manifest(), body_bytes=64))],
        INVALID,
        "PARCEL_MANIFEST",
    ),
    "a trailer of another model": (
        lambda sent, shipment: [*sent[:-1], trailer_of(shipment.manifest(compatibility="x"))],
        "FAILED_PRECONDITION",
        "INCOMPATIBLE_PARCEL",
    ),
    "a trailer of another attempt": (
        lambda sent, shipment: [*sent[:-1], trailer_of(shipment.manifest(attempt=2))],
        "FAILED_PRECONDITION",
        "TRANSFER_ID",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("again", ["in waves", "whole"])
def test_what_is_damaged_or_untrue_is_refused_and_may_be_sent_again(
    loaded: LoadedModel, shipment: Shipment, what: str, again: str
) -> None:
    damage, code, reason = DAMAGES[what]

    async def body(served: Served) -> None:
        promise = await served.reserve()
        good = wave_frames(promise.token, shipment.manifest(), shipment.body)
        error = await failure(served.put(damage(good, shipment)))
        assert (error.code, error.reason) == (code, reason)
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        whole = frames(promise.token, shipment.manifest(), shipment.body)
        await served.put(good if again == "in waves" else whole)
        assert installed(served, promise.token)[1] == bytes(shipment.body)
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_more_than_was_reserved_is_refused_before_its_trailer(loaded: LoadedModel, shipment: Shipment) -> None:
    """And before any of it is kept: what is too much is never written anywhere."""

    async def body(served: Served) -> None:
        promise = await served.reserve()
        # each row with a score and its wave
        layout: KVLayout = loaded.identity.layout
        bound = promise.reserved_bytes + promise.reserved_bytes // (2 * layout.row_bytes) * 5
        endless = served.open_put()
        await endless.write(encode_opening(promise.token))
        for frame in chunks(bytes(bound), 4096):
            await endless.write(frame)
        await until(lambda: "filling" in served.held_bytes())
        await endless.write(encode_chunk(bound, memoryview(b"x")))
        await until(lambda: served.held_bytes() == {"reserved": promise.reserved_bytes})
        await endless.done_writing()
        error = await failure(endless)
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "OVER_RESERVATION")
        await served.put(wave_frames(promise.token, shipment.manifest(), shipment.body))
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_a_parcel_larger_than_reserved_is_refused_by_its_trailer(loaded: LoadedModel, shipment: Shipment) -> None:
    """Its KV alone would fit, but not with the tokens that are to come."""

    async def body(served: Served) -> None:
        promise = await served.reserve()
        manifest, layout = shipment.manifest(), loaded.identity.layout
        num_kept = (41,) * len(manifest.num_kept)
        rows = bytes(layout.body_bytes(num_kept))
        large = dataclasses.replace(
            manifest, num_kept=num_kept, logical_length=99, body_bytes=len(rows), digest=body_digest(memoryview(rows))
        )
        assert len(rows) < promise.reserved_bytes
        error = await failure(served.put(wave_frames(promise.token, large, rows)))
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "OVER_RESERVATION")
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}

    run(loaded, body)


def test_an_opening_needs_a_reservation(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        error = await failure(served.put(wave_frames(b"no such token", shipment.manifest(), shipment.body)))
        assert (error.code, error.reason) == ("NOT_FOUND", "NO_RESERVATION")
        await served.nothing_is_held()

    run(loaded, body)


@pytest.mark.parametrize("sent", [1, 3])
def test_a_sender_that_dies_half_way_may_come_again(loaded: LoadedModel, shipment: Shipment, sent: int) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        good = wave_frames(promise.token, shipment.manifest(), shipment.body)
        dying = served.open_put()
        for frame in good[:sent]:
            await dying.write(frame)
        await until(lambda: "filling" in served.held_bytes())
        dying.cancel()
        await until(lambda: served.held_bytes() == {"reserved": promise.reserved_bytes})
        await served.put(good)
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_an_ended_request_does_not_wait_for_the_prefill(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        stalled = served.open_put()
        for frame in wave_frames(promise.token, shipment.manifest(), shipment.body)[:2]:
            await stalled.write(frame)
        await until(lambda: "filling" in served.held_bytes())
        served.worker.runner.end_all(served.held.find(promise.token))
        await until(lambda: served.held_bytes() == {})
        await stalled.done_writing()
        error = await failure(stalled)
        assert (error.code, error.reason) == ("ABORTED", "RELEASED")

    run(loaded, body)


def test_nobody_renews_and_the_lease_ends(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        stalled = served.open_put()
        await stalled.write(encode_opening(promise.token))
        await until(lambda: "filling" in served.held_bytes())
        served.worker.runner.expire(served.held.find(promise.token).expires_at + 1)
        await until(lambda: served.held_bytes() == {})
        await stalled.done_writing()
        assert (await failure(stalled)).code == "ABORTED"

    run(loaded, body)


def test_parcels_that_arrive_together_do_not_mix(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        names = [f"r{number}" for number in range(6)]
        tokens = {name: (await served.reserve(request_id=name)).token for name in names}
        manifests = {name: shipment.manifest(name) for name in names}
        sent = {
            name: wave_frames(
                tokens[name], manifests[name], shipment.body, random_waves(manifests[name], seed=seed), 300
            )
            if seed % 2
            else frames(tokens[name], manifests[name], shipment.body, 300)
            for seed, name in enumerate(names)
        }
        await asyncio.gather(*(served.put(sent[name]) for name in names))
        for token in tokens.values():
            assert installed(served, token)[1] == bytes(shipment.body)
            served.worker.runner.end_all(served.held.find(token))
        await served.nothing_is_held()

    run(loaded, body)
