"""Parcels that evict, through a whole decode worker behind real gRPC."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from pathlib import Path
from typing import Any

import grpc
import pytest

from decode_worker.engine import EagerEngine
from decode_worker.worker import LoadedModel
from shared.kv.eviction import Eviction, FixedSlot, HeavyHitters, Recall, Scope, SharedLayers, SparseRead, TextGuard
from shared.kv.manifest import body_digest
from shared.request.sampling import Sampling
from tests.unit.decode_worker.eviction.shipments import RuledShipment
from tests.unit.decode_worker.pools import slab_pool
from tests.unit.decode_worker.sequences import LAYOUT, advance, prefill, text_ids
from tests.unit.decode_worker.serving import Served, TokenStream, failure, frames, run
from tests.unit.decode_worker.test_preemption import STORAGES, preemptions
from tests.unit.decode_worker.tiny import load_whole

STEPS, PROMPT = 40, 60
KEPT = range(0, PROMPT, 3)
SAMPLING = Sampling(max_new_tokens=STEPS + 1, ignore_eos=True)
KINDS: dict[str, Eviction | None] = {
    "nothing": None,
    "elastic": FixedSlot(retention=(Fraction(2, 3),) * 3, distance=-5),
    "h2o": HeavyHitters(budget=len(KEPT), recent=6),
    "d2o": Recall(budget=(len(KEPT), len(KEPT) + 2, len(KEPT) + 5), recent=(5, 0, 9), sinks=2),
    "scope": Scope(variant="discontinuous", window=6, recent=2, delta=5),
    "tgv": TextGuard(retention=(Fraction(1, 3),) * 3, sinks=4, text=(3, 0, 5)),
    "tidal": SparseRead(select_layers=(0,), top=7),
    "sharer": SharedLayers(borrowers=(2,), lenders=(0,)),
}


@pytest.fixture(scope="module")
def shipments(checkpoint: Path) -> dict[str, RuledShipment]:
    prompt = prefill(load_whole(checkpoint), text_ids(6, PROMPT))
    return {kind: RuledShipment(prompt, KEPT, eviction) for kind, eviction in KINDS.items()}


def tokens_of(loaded: LoadedModel, shipment: RuledShipment) -> list[int]:
    """Without a worker."""
    pool = slab_pool(LAYOUT, 1 << 20)
    engine, each, made = EagerEngine(loaded.model, pool), shipment.installed(pool, STEPS), []
    for _ in range(STEPS):
        advance([each], engine.step([each]))
        made.append(each.last_token)
    return made


async def ask(served: Served, loaded: LoadedModel, shipment: RuledShipment, stream: TokenStream, number: int) -> None:
    """Again while the memory is full."""
    while True:
        try:
            promise = await served.reserve(request_id=str(number), max_new_tokens=STEPS + 1, kept_tokens_bound=40)
            break
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            await asyncio.sleep(0.002)
    compatibility = loaded.identity.compatibility
    manifest = shipment.manifest(str(number), compatibility=compatibility, sampling=SAMPLING)
    await served.put(frames(promise.token, manifest, shipment.body))
    await stream.attach(number, promise.token)


@pytest.mark.parametrize("storage", STORAGES)
def test_all_kinds_at_once(loaded: LoadedModel, shipments: dict[str, RuledShipment], storage: str) -> None:
    async def body(served: Served) -> None:
        stream = served.stream()
        await asyncio.gather(
            *(ask(served, loaded, shipment, stream, number) for number, shipment in enumerate(shipments.values()))
        )
        for number, shipment in enumerate(shipments.values()):
            assert await stream.tokens(number) == tokens_of(loaded, shipment)
        await served.nothing_is_held()

    run(loaded, body, build=STORAGES[storage], max_num_seqs=6)


@pytest.mark.parametrize("storage", STORAGES)
def test_parked_in_the_middle(loaded: LoadedModel, shipments: dict[str, RuledShipment], storage: str) -> None:
    """Little is promised and there is little room: sequences leave and come back with all that they know."""

    async def body(served: Served) -> None:
        pool, stream = served.worker.runner._pool, served.stream()
        wanted = round(2.5 * pool.sequence_bytes(shipments["nothing"].num_kept, STEPS))
        ballast = await served.reserve(
            request_id="ballast",
            kept_tokens_bound=(pool.capacity - wanted) // LAYOUT.token_bytes,
            max_new_tokens=1,
        )
        await asyncio.gather(
            *(ask(served, loaded, shipment, stream, number) for number, shipment in enumerate(shipments.values()))
        )
        for number, shipment in enumerate(shipments.values()):
            assert await stream.tokens(number) == tokens_of(loaded, shipment)
        assert sum(preemptions(served).values()) > 2
        served.worker.runner.end_all(served.held.find(ballast.token))
        await served.nothing_is_held()

    # nobody renews the ballast's lease, however long the others take
    run(loaded, body, build=STORAGES[storage], promised_tokens=3, max_num_seqs=6, lease_s=300.0)


@pytest.mark.parametrize(("kind", "room"), [("nothing", 3), ("h2o", STEPS), ("tgv", 3), ("elastic", 3)])
def test_who_needs_no_more_rows_than_were_promised_comes_with_room_for_all(
    loaded: LoadedModel, shipments: dict[str, RuledShipment], kind: str, room: int
) -> None:
    shipment = shipments[kind]

    async def body(served: Served) -> None:
        stream, pool = served.stream(), served.worker.runner._pool
        await ask(served, loaded, shipment, stream, 1)
        assert await stream.tokens(1) == tokens_of(loaded, shipment)
        outgrown = preemptions(served)["outgrown"]
        assert (outgrown > 0) == (room < STEPS)

        promise = await served.reserve(max_new_tokens=STEPS + 1, kept_tokens_bound=40)
        manifest = shipment.manifest(compatibility=loaded.identity.compatibility, sampling=SAMPLING)
        await served.put(frames(promise.token, manifest, shipment.body))
        (held,) = served.held.find(promise.token).answers.values()
        assert held.sequence is not None
        assert held.sequence.kv.room == room
        if kind == "h2o":
            assert held.pool_bytes == pool.sequence_bytes(shipment.num_kept, 1)
        served.worker.runner.end(held)

    run(loaded, body, promised_tokens=3)


def test_rows_that_are_lost_show(loaded: LoadedModel, shipments: dict[str, RuledShipment]) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve(max_new_tokens=STEPS + 1, kept_tokens_bound=40)
        manifest = shipments["tgv"].manifest(compatibility=loaded.identity.compatibility, sampling=SAMPLING)
        await served.put(frames(promise.token, manifest, shipments["tgv"].body))
        (held,) = served.held.find(promise.token).answers.values()
        served.worker.runner.check_integrity()
        assert held.eviction_at_rest is not None
        held.eviction_at_rest.lengths[1, 0] -= 1
        with pytest.raises(AssertionError, match="rows were lost"):
            served.worker.runner.check_integrity()
        served.worker.runner.end(held)

    run(loaded, body)


def damaged(shipment: RuledShipment, how: str) -> tuple[bytearray, dict[str, Any]]:
    body = bytearray(shipment.body)
    if how == "not a number":
        body[-4:] = b"\xff\xff\xff\x7f"
        return body, {"digest": body_digest(memoryview(body))}
    if how == "changed on the way":
        body[-1] ^= 1
        return body, {}
    return body, {"eviction": HeavyHitters(budget=3, recent=1)}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("not a number", "PARCEL_SCORES"),
        ("changed on the way", "PARCEL_DIGEST"),
        ("less budget than rows", "PARCEL_MANIFEST"),
    ],
)
def test_bad_scores_are_refused_and_leave_nothing(
    loaded: LoadedModel, shipments: dict[str, RuledShipment], how: str, reason: str
) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve(max_new_tokens=STEPS + 1, kept_tokens_bound=40)
        parcel, changes = damaged(shipments["h2o"], how)
        manifest = shipments["h2o"].manifest(compatibility=loaded.identity.compatibility, sampling=SAMPLING, **changes)
        error = await failure(served.put(frames(promise.token, manifest, parcel)))
        assert error.reason == reason
        served.worker.runner.end_all(served.held.find(promise.token))
        await served.nothing_is_held()

    run(loaded, body)
