"""A parcel is given up whenever its router says so: before it is there, while it is sent, and when its call is over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from vlcache.worker.v1 import prefill_pb2 as pb

from prefill_worker.config import PrefillConfig
from prefill_worker.job import Compressed, FirstToken, Retained, Transferred
from prefill_worker.worker import LoadedModel, load_model
from shared.errors import DuplicateRequestError
from tests.unit.prefill_worker.manifests import manifest
from tests.unit.prefill_worker.pieces import Pieces, Stage, collect, idle, job, reached, ticket, until
from tests.unit.prefill_worker.pieces import run as run_pieces
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture
from tests.unit.prefill_worker.served import Stack, failure, run

KINDS = ["first_token", "compression", "retained", "transfer"]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(PrefillConfig(model=str(checkpoint), dtype="float32"))


@pytest.mark.parametrize("stage", ["building", "computing", "arriving"])
def test_a_release_that_overtakes_the_parcel_leaves_none(stage: str) -> None:
    async def body(pieces: Pieces) -> None:
        where: Stage = getattr(pieces, stage)
        where.block()
        work = job()
        task = asyncio.create_task(collect(pieces, work))
        await reached(where)
        pieces.retained.release(work.parcel)
        where.open.set()
        assert [type(event) for event in await task] == [FirstToken, Compressed, Transferred]
        await idle(pieces)
        assert pieces.store.used_bytes == 0

    run_pieces(body)


def test_a_release_while_the_parcel_is_sent_ends_it_afterwards() -> None:
    async def body(pieces: Pieces) -> None:
        pieces.sending.block()
        work = job()
        task = asyncio.create_task(collect(pieces, work))
        await reached(pieces.sending)
        pieces.retained.release(work.parcel)
        assert pieces.store.used_bytes == manifest().body_bytes
        pieces.sending.open.set()
        assert [type(event) for event in await task] == [FirstToken, Compressed, Retained, Transferred]
        assert pieces.store.used_bytes == 0

    run_pieces(body)


@pytest.mark.parametrize("stage", ["building", "computing", "arriving", "sending"])
def test_a_secret_of_another_call_is_refused_and_that_one_goes_on(stage: str) -> None:
    async def body(pieces: Pieces) -> None:
        where: Stage = getattr(pieces, stage)
        where.block()
        first = job("first")
        task = asyncio.create_task(collect(pieces, first))
        await reached(where)
        with pytest.raises(DuplicateRequestError) as caught:
            await collect(pieces, job("second", parcel=first.parcel))
        assert caught.value.reason == "PARCEL_IN_USE"
        where.open.set()
        assert len(await task) == 4
        with pytest.raises(DuplicateRequestError):
            await collect(pieces, job("third", parcel=first.parcel))
        await pieces.runner.resend(first.parcel, 2, ticket())
        pieces.retained.release(first.parcel)
        assert len(await collect(pieces, job("fourth", parcel=first.parcel))) == 4

    run_pieces(body)


@pytest.mark.parametrize("order", ["cancel, release", "release, cancel", "release"])
@pytest.mark.parametrize("heard", range(len(KINDS) + 1))
def test_a_router_that_gives_up_after_any_event_leaves_nothing(loaded: LoadedModel, heard: int, order: str) -> None:
    async def body(stack: Stack) -> None:
        request = stack.request(encoded(picture(1)), QUESTION)
        call = stack.stub.Prefill(request)
        await until(lambda: stack.worker.runner._jobs)
        events = (event.WhichOneof("event") async for event in call)
        said = [await anext(events) for _ in range(heard)]
        assert said == KINDS[:heard]
        for step in order.split(", "):
            if step == "cancel":
                call.cancel()
            else:
                await stack.release(request.parcel)
        if order == "release":
            said += [kind async for kind in events]
            assert said in (KINDS, [kind for kind in KINDS if kind != "retained"])
        await asyncio.wait_for(until(lambda: not stack.worker.runner._jobs), 1.0)
        stack.nothing_is_held()

    run(loaded, body)


def test_a_secret_in_use_has_its_status(loaded: LoadedModel) -> None:
    async def body(stack: Stack) -> None:
        parcel = await stack.retained(QUESTION)
        error = await failure(stack.prefill(stack.request(QUESTION, attempt=2, parcel=parcel)))
        assert (error.code, error.reason) == ("ALREADY_EXISTS", "PARCEL_IN_USE")
        assert await stack.gone(parcel) == []
        assert [manifest.transfer.attempt for _, manifest, _ in stack.sink.parcels] == [1]
        await stack.stub.ReleaseParcels(pb.ReleaseParcelsRequest(parcels=[parcel]))
        stack.nothing_is_held()

    run(loaded, body)
