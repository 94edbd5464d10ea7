"""What a reservation says that it promised, and that what was delivered already has room on top."""

from __future__ import annotations

import pytest
from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker.worker import LoadedModel
from shared.errors import ServiceError
from tests.unit.decode_worker.failover import Ahead, ahead, go_on, sampling
from tests.unit.decode_worker.serving import Served, failure, frames, run
from tests.unit.decode_worker.shipment import Shipment

BOUND = 50


@pytest.mark.parametrize(
    ("max_new_tokens", "delivered_tokens", "tokens"),
    [(20, 0, 3), (20, 7, 10), (20, 16, 19), (20, 17, 19), (20, 99, 19), (3, 0, 2), (1, 0, 0), (1, 5, 0)],
)
def test_a_sparse_promise(loaded: LoadedModel, max_new_tokens: int, delivered_tokens: int, tokens: int) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve(
            kept_tokens_bound=BOUND, max_new_tokens=max_new_tokens, delivered_tokens=delivered_tokens
        )
        assert promise.promised_tokens == min(3, max_new_tokens - 1), "whatever was delivered"
        pool = served.worker.runner._pool
        assert promise.reserved_bytes == held_for(served, BOUND, tokens)
        # it grows with the same tokens to come
        more = await served.decode.GrowReservation(
            pb.GrowReservationRequest(token=promise.token, kept_tokens_bound=BOUND + 9)
        )
        assert more.reserved_bytes == held_for(served, BOUND + 9, tokens) == pool.used_bytes

    run(loaded, body, promised_tokens=3)


def held_for(served: Served, kept_tokens: int, tokens: int) -> int:
    """Bytes that the pool gives out for so much."""
    pool = served.worker.runner._pool
    allocation = pool.allocate(pool.bound_bytes(kept_tokens, tokens))
    nbytes = allocation.nbytes
    pool.free(allocation)
    return nbytes


@pytest.mark.parametrize("delivered_tokens", [0, 7, 99])
def test_without_sparing_all_is_promised(loaded: LoadedModel, delivered_tokens: int) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve(kept_tokens_bound=BOUND, max_new_tokens=20, delivered_tokens=delivered_tokens)
        assert promise.promised_tokens == 19
        assert promise.reserved_bytes == held_for(served, BOUND, 19)

    run(loaded, body)


@pytest.mark.parametrize(("delivered", "taken"), [(0, False), (1, False), (2, True), (4, True)])
def test_a_parcel_keeps_to_the_promise(loaded: LoadedModel, shipment: Shipment, delivered: int, taken: bool) -> None:
    """Five tokens were drawn ahead: the KV of four and the row of a step need as many promised."""
    parcel = ahead(loaded, shipment, 5)

    async def body(served: Served) -> None:
        promise = await served.reserve(
            kept_tokens_bound=BOUND, max_new_tokens=20, attempt=2, delivered_tokens=delivered
        )
        assert promise.promised_tokens == 3
        sent = frames(promise.token, parcel.manifest("r", 2, sampling(20)), parcel.body)
        if taken:
            return await served.put(sent)
        error = await failure(served.put(sent))
        assert (error.reason, error.stage, error.worker) == ("AHEAD_OF_PROMISE", "transfer", "d")
        return None

    run(loaded, body, promised_tokens=3)


def test_the_whole_pool_must_have_room_whatever_was_delivered(loaded: LoadedModel) -> None:
    async def body(served: Served) -> None:
        pool = served.worker.runner._pool
        tokens = pool.capacity // pool.layout.full_bytes(1)
        for delivered_tokens in (0, tokens):
            request = {"max_new_tokens": tokens + 2 - BOUND, "kept_tokens_bound": BOUND}
            error = await failure(served.reserve(**request, delivered_tokens=delivered_tokens))
            assert error.reason == "TOO_LARGE"
        promise = await served.reserve(
            max_new_tokens=tokens + 1 - BOUND, kept_tokens_bound=BOUND, delivered_tokens=tokens
        )
        assert promise.promised_tokens == 3
        assert promise.reserved_bytes >= pool.bound_bytes(BOUND, tokens - BOUND)

    run(loaded, body, promised_tokens=3)


def test_what_was_delivered_and_announced_needs_no_move(loaded: LoadedModel, shipment: Shipment) -> None:
    """The parcel comes with room for all that is replayed and for what is promised after it."""
    parcel: Ahead = ahead(loaded, shipment, 1)
    answer = [shipment.prompt.first_token, *shipment.tokens(14)]

    async def body(served: Served) -> None:
        stream = served.stream()
        token = await go_on(served, parcel, stream, 1, announced=9)
        (held,) = served.held.find(token).answers.values()
        assert held.sequence is not None
        assert held.sequence.kv.room == 9 + 3
        await stream.finished(1)
        await go_on(served, parcel, stream, 2, answer[:9], how=sampling(12))
        assert await stream.tokens(2) == answer[9:12]
        metrics = served.worker.metrics
        # the first had no more room than three tokens beyond nine, of fourteen
        assert metrics.labelled(metrics.preemptions, reason="outgrown")._value.get() == 1

    run(loaded, body, promised_tokens=3)


@pytest.mark.parametrize("what", ["a wrong token", "a foreign parcel", "a damaged body"])
def test_errors_of_a_delivery_name_their_stage(loaded: LoadedModel, shipment: Shipment, what: str) -> None:
    parcel = ahead(loaded, shipment, 1)

    async def error_of(served: Served) -> ServiceError:
        promise = await served.reserve(attempt=2)
        manifest = parcel.manifest("r", 3 if what == "a foreign parcel" else 2, sampling(8))
        if what == "a wrong token":
            return await failure(served.put(frames(b"guess", manifest, parcel.body)))
        body = bytearray(parcel.body)
        body[5] ^= what == "a damaged body"
        return await failure(served.put(frames(promise.token, manifest, body)))

    async def body(served: Served) -> None:
        error = await error_of(served)
        stage = {"a damaged body": "install"}.get(what, "transfer")
        assert (error.stage, error.worker) == (stage, "d")

    run(loaded, body)
