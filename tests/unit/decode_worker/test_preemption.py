"""Overcommitted memory behind real gRPC: the tokens are those of a worker with memory for everyone."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from decode_worker.config import DecodeConfig
from decode_worker.graph_engine import GraphEngine
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.worker import LoadedModel, build_engine
from tests.unit.decode_worker.pools import block_pool, poison
from tests.unit.decode_worker.scripted import deliver
from tests.unit.decode_worker.serving import BuildEngine, Served, TokenStream, run, until
from tests.unit.decode_worker.shipment import Shipment

NEW_TOKENS = 40
STEPS = NEW_TOKENS - 1
HOW: dict[int, dict[str, Any]] = {
    0: {},
    1: {"temperature": 1.3, "seed": 1},
    2: {},
    3: {"temperature": 0.9, "top_k": 7, "seed": 3},
    4: {"temperature": 1.1, "top_p": 0.8, "seed": 4},
    5: {},
}
PROMISED = 2


def slabs(config: DecodeConfig, loaded: LoadedModel) -> tuple[Any, Any]:
    pool, engine = build_engine(config, loaded)
    poison(pool)
    return pool, engine


def blocks(config: DecodeConfig, loaded: LoadedModel) -> tuple[Any, Any]:
    """What a GPU gets, on the CPU."""
    pool = block_pool(loaded.identity.layout, 1 << 20, block_size=4, max_num_seqs=config.max_num_seqs)
    poison(pool)
    return pool, GraphEngine(loaded.model, pool, max_num_seqs=config.max_num_seqs)


STORAGES: dict[str, BuildEngine] = {"slabs": slabs, "blocks": blocks}


async def leave_room_for(served: Served, shipment: Shipment, sequences: float) -> bytes:
    """Someone else holds the rest of the pool; returns the secret of that reservation."""
    pool = served.worker.runner._pool
    wanted = round(sequences * pool.sequence_bytes(shipment.num_kept, STEPS))
    tokens = (pool.capacity - wanted) // pool.layout.token_bytes
    ballast = await served.reserve(request_id="ballast", kept_tokens_bound=tokens, max_new_tokens=1)
    assert pool.capacity - pool.used_bytes < wanted + 2 * pool.layout.token_bytes * 4
    return ballast.token


async def only_that_is_left(served: Served, ballast: bytes) -> None:
    await until(lambda: [held.token for held in served.held] == [ballast])
    served.worker.runner.end_all(served.held.find(ballast))
    await served.nothing_is_held()
    assert served.held.parked_bytes == 0


async def ask(served: Served, shipment: Shipment, stream: TokenStream, number: int, **how: Any) -> None:
    """Again and again while the memory is full, as a router does."""
    while True:
        try:
            token = await deliver(served, shipment, str(number), max_new_tokens=NEW_TOKENS, **how)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            await asyncio.sleep(0.002)
        else:
            return await stream.attach(number, token)


async def start_both(served: Served, shipment: Shipment, first: TokenStream, second: TokenStream) -> None:
    """Both are there before either grows: one has to wait until the other is done."""
    tokens = [await deliver(served, shipment, str(number), max_new_tokens=NEW_TOKENS) for number in (0, 1)]
    await first.attach(0, tokens[0])
    await second.attach(1, tokens[1])


def preemptions(served: Served) -> dict[str, float]:
    metrics = served.worker.metrics
    return {
        reason: metrics.labelled(metrics.preemptions, reason=reason)._value.get() for reason in ("outgrown", "evicted")
    }


@pytest.mark.parametrize("storage", STORAGES)
def test_everyone_finishes_with_the_tokens_of_an_unhurried_worker(
    loaded: LoadedModel, shipment: Shipment, storage: str
) -> None:
    async def body(served: Served) -> None:
        ballast = await leave_room_for(served, shipment, sequences=2.5)
        stream = served.stream()
        await asyncio.gather(*(ask(served, shipment, stream, number, **how) for number, how in HOW.items()))
        for number, how in HOW.items():
            assert await stream.tokens(number) == shipment.tokens(STEPS, **how)
        assert preemptions(served)["outgrown"] >= len(HOW)
        await only_that_is_left(served, ballast)

    run(loaded, body, build=STORAGES[storage], promised_tokens=PROMISED, max_num_seqs=6)


@pytest.mark.parametrize("how", ["cancel", "release", "stream break"])
def test_who_ends_while_parked_is_gone_and_the_others_go_on(loaded: LoadedModel, shipment: Shipment, how: str) -> None:
    async def body(served: Served) -> None:
        ballast = await leave_room_for(served, shipment, sequences=1.2)
        stream, other = served.stream(), served.stream()
        await start_both(served, shipment, stream, other)
        await until(lambda: any(held.parked for held in served.held.answers))
        parked = next(held for held in served.held.answers if held.parked)
        ended, stays, reader = (0, 1, other) if parked.reservation.request_id == "0" else (1, 0, stream)
        if how == "stream break":
            await (stream if ended == 0 else other).close()
        elif how == "cancel":
            await (stream if ended == 0 else other).cancel(ended)
        else:
            served.worker.runner.end(parked)
        assert await reader.tokens(stays) == shipment.tokens(STEPS)
        await only_that_is_left(served, ballast)

    run(loaded, body, promised_tokens=PROMISED)


@pytest.mark.parametrize("timeout_s", [15.0, 0.0])
def test_a_drain_waits_for_who_is_parked_or_tells_them(
    loaded: LoadedModel, shipment: Shipment, timeout_s: float
) -> None:
    async def body(served: Served) -> None:
        ballast = await leave_room_for(served, shipment, sequences=1.2)
        stream = served.stream()
        await start_both(served, shipment, stream, stream)
        await until(lambda: any(held.parked for held in served.held.answers))
        served.worker.runner.end_all(served.held.find(ballast))
        # a command that is still on its way would find nothing
        await until(lambda: all(held.subscription for held in served.held.answers))
        await served.worker.drain(timeout_s)
        for number in (0, 1):
            updates = await stream.finished(number)
            reasons = [update.error.reason for update in updates if update.HasField("error")]
            assert reasons == ([] if timeout_s or updates[-1].finish_reason else ["DRAINING"])
        await served.nothing_is_held()

    run(loaded, body, promised_tokens=PROMISED)


def test_a_copy_that_fails_is_told_and_nothing_is_lost(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [MemoryError("no host memory")]
    export = SlabPool.export

    def failing(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return export(*args)

    monkeypatch.setattr(SlabPool, "export", failing)

    async def body(served: Served) -> None:
        ballast = await leave_room_for(served, shipment, sequences=2.5)
        stream = served.stream()
        for number in range(3):
            await ask(served, shipment, stream, number)
        updates = [await stream.finished(number) for number in range(3)]
        failed = [each for each in updates if each[-1].HasField("error")]
        assert [each[-1].error.code for each in failed] == [grpc.StatusCode.INTERNAL.value[0]]
        assert "host memory" not in failed[0][-1].error.message
        for each in updates:
            if each not in failed:
                assert [token for update in each for token in update.token_ids] == shipment.tokens(STEPS)
        await only_that_is_left(served, ballast)

    run(loaded, body, promised_tokens=PROMISED)
