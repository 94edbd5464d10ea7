"""Encoded parcels over every way: restored outside the step thread, refused when they contradict themselves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from decode_worker import parcel_reader
from decode_worker.answers import Stage
from decode_worker.worker import LoadedModel
from shared.kv.encoding import Encoding
from shared.kv.manifest import Manifest, TransferId, body_digest
from shared.kv.transport.frames import encode_header
from tests.unit.decode_worker.encoded import EncodedShipment
from tests.unit.decode_worker.sequences import LAYOUT, prefill, text_ids
from tests.unit.decode_worker.serving import Served, failure, frames, run
from tests.unit.decode_worker.shipment import Shipment, answers
from tests.unit.decode_worker.test_install_kv import Sender, run_with_arena
from tests.unit.decode_worker.tiny import load_whole

ENCODINGS = {
    "8 bits": Encoding(bits=8, group=8, residual=4, key_channels=8),
    "4 bits": Encoding(bits=4, group=16, residual=0, key_channels=8),
    "2 bits": Encoding(bits=2, group=32, residual=3, key_channels=8),
    "fewer channels": Encoding(bits=0, group=32, residual=4, key_channels=5),
    "both": Encoding(bits=4, group=8, residual=4, key_channels=5),
    "hardly anything": Encoding(bits=2, group=256, residual=0, key_channels=1),
}


@pytest.fixture(scope="module")
def shipments(checkpoint: Path, loaded: LoadedModel) -> dict[str, EncodedShipment]:
    prompt = prefill(load_whole(checkpoint), text_ids(0, 40))
    return {name: EncodedShipment(prompt, loaded, encoding) for name, encoding in ENCODINGS.items()}


@pytest.fixture
def both(shipments: dict[str, EncodedShipment]) -> EncodedShipment:
    return shipments["both"]


def test_encodings_that_lose_much_change_the_answer(shipments: dict[str, EncodedShipment]) -> None:
    """Or the tests below could not tell a restored parcel from a plain one."""
    assert shipments["hardly anything"].expected != shipments["hardly anything"].unencoded
    assert shipments["8 bits"].expected == shipments["8 bits"].unencoded


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_parcel_over_grpc_is_restored(loaded: LoadedModel, shipments: dict[str, EncodedShipment], name: str) -> None:
    shipment = shipments[name]

    async def body(served: Served) -> None:
        promise = await served.reserve()
        await served.put(frames(promise.token, shipment.manifest(), shipment.body))
        exact = LAYOUT.body_bytes([kept + 7 for kept in shipment.num_kept])
        assert exact <= served.held.bytes_in(Stage.ACTIVE) < exact + 64
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_a_parcel_in_shared_memory_is_restored(loaded: LoadedModel, both: EncodedShipment) -> None:
    async def body(served: Served, sender: Sender) -> None:
        promise = await served.reserve(arena_socket=sender.socket)
        assert promise.transport == "memory"
        await served.transfer.InstallKV(sender.request(promise.token))
        sender.view(sender.slot)[:] = bytes(len(both.body))  # answered: the slot may be reused
        await answers(served, promise.token, both)

    run_with_arena(loaded, both, body)


def test_a_parcel_of_the_own_process_is_restored_without_its_digest(loaded: LoadedModel, both: EncodedShipment) -> None:
    async def body(served: Served) -> None:
        epoch = (await served.info()).epoch
        promise = await served.reserve(prefill_epoch=epoch)
        transfer = TransferId(request_id="r", attempt=1, prefill_epoch=epoch)
        manifest = both.manifest(transfer=transfer, digest=b"")
        await served.worker.receiver.take(promise.token, manifest, memoryview(both.body))
        await answers(served, promise.token, both)

    run(loaded, body)


def test_decoding_happens_in_the_install_thread(
    loaded: LoadedModel, both: EncodedShipment, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, plain = [], parcel_reader.decode

    def watched(*args: Any) -> None:
        threads.append(threading.current_thread().name)
        plain(*args)

    monkeypatch.setattr(parcel_reader, "decode", watched)

    async def body(served: Served) -> None:
        promise = await served.reserve()
        await served.put(frames(promise.token, both.manifest(), both.body))
        await answers(served, promise.token, both)

    run(loaded, body)
    assert [name.partition("_")[0] for name in threads] == ["install"]


def test_a_plain_parcel_is_not_decoded(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("decode_worker.arrivals.plain_body", lambda *_, **__: pytest.fail("decoded"))

    async def body(served: Served) -> None:
        promise = await served.reserve()
        await served.put(frames(promise.token, shipment.manifest(), shipment.body))
        await answers(served, promise.token, shipment)

    run(loaded, body)


def channels_at(shipment: EncodedShipment) -> int:
    return next(iter(shipment.encoding.layers(LAYOUT, shipment.num_kept))).fields["channels"].offset


def test_damage_is_called_damage_also_where_it_contradicts_the_encoding(
    loaded: LoadedModel, both: EncodedShipment
) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        for at in (0, channels_at(both), len(both.body) - 1):
            wrong = bytearray(both.body)
            wrong[at] ^= 1
            error = await failure(served.put(frames(promise.token, both.manifest(), wrong)))
            assert (error.code, error.reason) == ("DATA_LOSS", "PARCEL_DIGEST")
            assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        await served.put(frames(promise.token, both.manifest(), both.body))
        await answers(served, promise.token, both)

    run(loaded, body)


def test_a_body_that_contradicts_its_encoding_is_refused(loaded: LoadedModel, both: EncodedShipment) -> None:
    wrong = bytearray(both.body)
    wrong[channels_at(both)] ^= 1
    lie = both.manifest(digest=body_digest(memoryview(wrong)))

    async def body(served: Served) -> None:
        promise = await served.reserve()
        error = await failure(served.put(frames(promise.token, lie, wrong)))
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "PARCEL_ENCODING")
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        await served.put(frames(promise.token, both.manifest(), both.body))
        await answers(served, promise.token, both)

    run(loaded, body)


def lying(manifest: Manifest, **encoding: int) -> Any:
    message = manifest.to_proto()
    for name, value in encoding.items():
        setattr(message.encoding, name, value)
    return message


HOSTILE: dict[str, dict[str, int]] = {
    "bits that do not exist": {"bits": 7},
    "other bits than the body has": {"bits": 2},
    "no group": {"group": 0},
    "an enormous group": {"group": 2**32 - 1},
    "everything in the residual": {"residual": 2**32 - 1},
    "no channel": {"key_channels": 0},
    "more channels than there are": {"key_channels": 9},
    "one channel more than was sent": {"key_channels": 6},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_encoding_is_refused_before_a_buffer_is_taken(
    loaded: LoadedModel, both: EncodedShipment, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        monkeypatch.setattr(served.worker.receiver, "_buffers", None)
        sent = frames(promise.token, both.manifest(), both.body)
        sent[0] = encode_header(promise.token, lying(both.manifest(), **HOSTILE[what]))
        error = await failure(served.put(sent))
        assert error.code == "INVALID_ARGUMENT"
        assert error.reason in ("PARCEL_ENCODING", "PARCEL_MANIFEST")
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}

    run(loaded, body)
