"""Parcels over the network: right ones are installed, wrong ones leave the reservation as it was."""

from __future__ import annotations

import asyncio

import pytest
from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker.answers import Stage
from decode_worker.worker import LoadedModel
from tests.unit.decode_worker.sequences import everything
from tests.unit.decode_worker.serving import Served, failure, flipped, frames, run, until
from tests.unit.decode_worker.shipment import MAX_NEW_TOKENS, Shipment, answers


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_a_parcel_in_chunks_of_any_size_is_installed(loaded: LoadedModel, shipment: Shipment, chunk: int) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        assert promise.transport == "grpc"
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        await served.put(frames(promise.token, shipment.manifest(), shipment.body[: 1 << 20], chunk))
        growth = MAX_NEW_TOKENS - 1
        exact = loaded.identity.layout.body_bytes([kept + growth for kept in shipment.num_kept])
        assert served.held_bytes() == {"active": -(-exact // 64) * 64}, "what the bound had too much is free"
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_a_reservation_holds_what_its_bound_promises_to_the_last_token(loaded: LoadedModel, shipment: Shipment) -> None:
    whole = Shipment(shipment.prompt, loaded, everything(shipment.prompt.num_tokens))

    async def body(served: Served) -> None:
        promise = await served.reserve(kept_tokens_bound=whole.prompt.num_tokens)
        exact = loaded.identity.layout.full_bytes(whole.prompt.num_tokens + MAX_NEW_TOKENS - 1)
        assert promise.reserved_bytes == -(-exact // 64) * 64
        await served.put(frames(promise.token, whole.manifest(), whole.body))
        await answers(served, promise.token, whole)

    run(loaded, body)


def test_who_attaches_first_gets_the_tokens_when_the_parcel_comes(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        promise, stream = await served.reserve(), served.stream()
        await stream.attach(7, promise.token)
        await until(lambda: served.held.find(promise.token).answers[0].subscription)
        await served.put(frames(promise.token, shipment.manifest(), shipment.body))
        assert await stream.tokens(7) == shipment.expected

    run(loaded, body)


def test_a_second_delivery_is_refused_and_disturbs_nothing(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        good = frames(promise.token, shipment.manifest(), shipment.body)
        slow = served.open_put()
        await slow.write(good[0])
        await until(lambda: served.held_bytes() == {"filling": promise.reserved_bytes})
        for _ in range(2):
            error = await failure(served.put(good))
            assert (error.code, error.reason) == ("FAILED_PRECONDITION", "ALREADY_COMMITTED")
            assert served.held.find(promise.token).stage is Stage.FILLING
        for frame in good[1:]:
            await slow.write(frame)
        await slow.done_writing()
        await slow
        error = await failure(served.put(good))
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "ALREADY_COMMITTED")
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_a_sender_that_dies_half_way_may_come_again(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        good = frames(promise.token, shipment.manifest(), shipment.body)
        dying = served.open_put()
        for frame in good[:3]:
            await dying.write(frame)
        await until(lambda: "filling" in served.held_bytes())
        dying.cancel()
        await until(lambda: served.held_bytes() == {"reserved": promise.reserved_bytes})
        await served.put(good)
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_a_sender_that_stalls_does_not_keep_the_memory_of_an_ended_request(
    loaded: LoadedModel, shipment: Shipment
) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve()
        stalled = served.open_put()
        for frame in frames(promise.token, shipment.manifest(), shipment.body)[:2]:
            await stalled.write(frame)
        await until(lambda: "filling" in served.held_bytes())
        served.worker.runner.end_all(served.held.find(promise.token))
        await until(lambda: served.held_bytes() == {})
        await stalled.done_writing()
        error = await failure(stalled)
        assert (error.code, error.reason) == ("ABORTED", "RELEASED")

    run(loaded, body)


def test_a_refused_sender_hears_why_though_it_still_writes(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the parcel is discarded first; but nobody waits for ever for a sender that stops."""

    async def body(served: Served) -> None:
        promise = await served.reserve()
        good = frames(promise.token, shipment.manifest(), shipment.body, 50)
        slow = served.open_put()
        await slow.write(good[0])
        await until(lambda: "filling" in served.held_bytes())
        await slow.write(flipped(good[1]))
        await until(lambda: "reserved" in served.held_bytes())
        await asyncio.sleep(0.05)  # a status that is sent now would cross the frames that follow
        for frame in good[2:]:
            await slow.write(frame)
        await slow.done_writing()
        error = await failure(slow)
        assert (error.code, error.reason) == ("DATA_LOSS", "CHUNK_CHECKSUM")
        monkeypatch.setattr("decode_worker.kv_receiver.DISCARD_TIMEOUT_S", 0.05)
        stalling = served.open_put()
        await stalling.write(good[0])
        await stalling.write(flipped(good[1]))
        assert (await failure(stalling)).code == "DATA_LOSS"
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}

    run(loaded, body)


def test_parcels_that_arrive_together_do_not_mix(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        stream, names = served.stream(), [f"r{number}" for number in range(6)]
        tokens = {name: (await served.reserve(request_id=name)).token for name in names}
        await asyncio.gather(
            *(served.put(frames(tokens[name], shipment.manifest(name), shipment.body, 300)) for name in names)
        )
        for handle, name in enumerate(names):
            await stream.attach(handle, tokens[name])
        for handle in range(len(names)):
            assert await stream.tokens(handle) == shipment.expected
        await served.nothing_is_held()

    run(loaded, body, max_num_seqs=4)


def test_commands_that_are_not_known_are_ignored(loaded: LoadedModel, shipment: Shipment) -> None:
    """An empty command is no cancellation of handle 0."""

    async def body(served: Served) -> None:
        promise, stream = await served.reserve(), served.stream()
        await stream.attach(0, promise.token)
        await stream.write(pb.TokenStreamRequest())
        await served.put(frames(promise.token, shipment.manifest(), shipment.body))
        assert await stream.tokens(0) == shipment.expected

    run(loaded, body)
