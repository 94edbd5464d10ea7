"""A sequence goes on where another worker was lost: its reader notices nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from decode_worker.worker import LoadedModel
from tests.unit.decode_worker.failover import (
    ANSWER,
    SAMPLED,
    Ahead,
    Watched,
    ahead,
    go_on,
    interpreted,
    replayed,
    sampling,
    uninterrupted,
)
from tests.unit.decode_worker.sequences import prefill, text_ids
from tests.unit.decode_worker.serving import Served, run, until
from tests.unit.decode_worker.shipment import Shipment
from tests.unit.decode_worker.test_preemption import STORAGES, preemptions
from tests.unit.decode_worker.tiny import load_whole

HOW: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": SAMPLED}
storages = pytest.mark.parametrize("storage", STORAGES)
hows = pytest.mark.parametrize("how", HOW.values(), ids=HOW)


@pytest.fixture(scope="module")
def shipment(checkpoint: Path, loaded: LoadedModel) -> Shipment:
    """One whose answer says something."""
    return Shipment(prefill(load_whole(checkpoint), text_ids(4, 40)), loaded)


@pytest.fixture(scope="module")
def parcel(loaded: LoadedModel, shipment: Shipment) -> Ahead:
    return ahead(loaded, shipment, 1)


def answer_of(shipment: Shipment, **how: Any) -> list[int]:
    return [shipment.prompt.first_token, *shipment.tokens(ANSWER - 1, **how)]


@storages
@hows
@pytest.mark.parametrize("drawn", [1, 4])
def test_wherever_it_was_cut_the_rest_is_the_same(
    loaded: LoadedModel, shipment: Shipment, storage: str, how: dict[str, Any], drawn: int
) -> None:
    """Also where less was delivered than came with the parcel: the prefill worker sends that."""
    params, parcel = sampling(**how), ahead(loaded, shipment, drawn, **how)

    async def body(served: Served) -> None:
        answer, texts = await uninterrupted(loaded, parcel, params, build=STORAGES[storage])
        assert len(answer) == ANSWER
        assert len(set(answer)) > 4, "an answer that says something"
        stream = served.stream()
        for cut in range(ANSWER):
            await go_on(served, parcel, stream, cut, answer[:cut], how=params, early=cut % 2 == 1)
        for cut in range(ANSWER):
            updates, sent = await stream.finished(cut), max(cut - drawn, 0)
            assert [list(update.token_ids) for update in updates] == [[token] for token in answer[drawn + sent :]]
            assert [update.text for update in updates] == texts[sent:]
        await served.nothing_is_held()
        cuts = range(drawn + 1, ANSWER)
        assert replayed(served) == (sum(cut - drawn for cut in cuts), len(cuts))

    run(loaded, body, build=STORAGES[storage], max_num_seqs=5)


def test_under_tritons_kernels(loaded: LoadedModel, shipment: Shipment, parcel: Ahead) -> None:
    pytest.importorskip("triton", reason="the extra `kernels` is not installed")
    answer = answer_of(shipment)

    async def body(served: Served) -> None:
        stream = served.stream()
        await go_on(served, parcel, stream, 1, answer[:12])
        assert await stream.tokens(1) == answer[12:]

    run(loaded, body, build=interpreted, max_num_seqs=5)


@storages
@pytest.mark.parametrize(
    ("max_num_seqs", "passes"), [(64, [13]), (13, [13]), (5, [5, 5, 3]), (1, [1] * 13)], ids=["64", "13", "5", "1"]
)
def test_it_takes_as_few_passes_as_a_batch_allows(
    loaded: LoadedModel, shipment: Shipment, parcel: Ahead, storage: str, max_num_seqs: int, passes: list[int]
) -> None:
    answer, watched = answer_of(shipment), Watched()

    async def body(served: Served) -> None:
        stream = served.stream()
        await go_on(served, parcel, stream, 1, answer[:14])
        assert await stream.tokens(1) == answer[14:]
        assert watched.passes == [("replay", number) for number in passes] + [("step", 1)]

    run(loaded, body, build=watched.build(STORAGES[storage]), max_num_seqs=max_num_seqs)


@storages
def test_the_others_go_on_in_between(loaded: LoadedModel, shipment: Shipment, parcel: Ahead, storage: str) -> None:
    """A full batch but for one place; their tokens are those of a worker of their own."""
    answer, watched, hows = answer_of(shipment), Watched(), [{}, SAMPLED, {**SAMPLED, "seed": 5}]

    async def body(served: Served) -> None:
        stream, held = served.stream(), asyncio.Event()
        entered = hold_steps(watched, held)
        for handle, how in enumerate(hows):
            await go_on(served, parcel, stream, handle, how=sampling(40, **how))
        await entered()
        await go_on(served, parcel, stream, 9, answer[:14])
        await until(lambda: served.worker.servicer._scheduler.waiting >= 1)
        held.set()
        assert await stream.tokens(9) == answer[14:]
        for handle, how in enumerate(hows):
            assert await stream.tokens(handle) == shipment.tokens(39, **how)
        at = [number for number, (what, _) in enumerate(watched.passes) if what == "replay"]
        assert watched.replays == [4, 4, 4, 1]
        assert all(watched.passes[number + 1] == ("step", 3) for number in at[:-1]), "one piece, then a step"
        assert watched.passes[at[-1] + 1] == ("step", 4)

    run(loaded, body, build=watched.build(STORAGES[storage]), max_num_seqs=4)


def hold_steps(watched: Watched, held: asyncio.Event) -> Callable[[], Any]:
    """Lets the step thread wait inside its first step; returns what waits for it to be there."""
    loop, entered, step = asyncio.get_running_loop(), asyncio.Event(), watched.step

    def waiting(batch: Any) -> list[int]:
        loop.call_soon_threadsafe(entered.set)
        asyncio.run_coroutine_threadsafe(held.wait(), loop).result(15)
        return step(batch)

    watched.step = waiting  # type: ignore[method-assign]
    return entered.wait


@storages
@pytest.mark.parametrize("announced", [None, 0], ids=["announced", "not announced"])
def test_room_is_promised_sparingly(
    loaded: LoadedModel, shipment: Shipment, parcel: Ahead, storage: str, announced: int | None
) -> None:
    """Where the reservation did not speak of what was delivered, the sequence outgrows its room in the middle."""
    answer, watched = answer_of(shipment), Watched()

    async def body(served: Served) -> None:
        stream = served.stream()
        for cut in range(1, ANSWER):
            await go_on(served, parcel, stream, cut, answer[:cut], announced=announced)
        for cut in range(1, ANSWER):
            assert await stream.tokens(cut) == answer[cut:]
        await served.nothing_is_held()
        assert sum(watched.replays) == sum(cut - 1 for cut in range(1, ANSWER))
        pieces = [number for number in watched.replays if number > 2]
        assert bool(pieces), "more than was promised goes in at once where there is room"
        assert preemptions(served)["outgrown"] > 0

    run(loaded, body, build=watched.build(STORAGES[storage]), promised_tokens=2)


def test_a_replay_never_writes_beyond_its_memory(loaded: LoadedModel, shipment: Shipment, parcel: Ahead) -> None:
    """It stops where its room ends, and goes on when it is back with more."""
    answer, watched = answer_of(shipment), Watched()

    async def body(served: Served) -> None:
        stream = served.stream()
        await go_on(served, parcel, stream, 1, answer[:14], announced=0)
        assert await stream.tokens(1) == answer[14:]
        # two rows were promised; what is known to follow has room at its return
        assert watched.passes == [("replay", 2), ("replay", 11), ("step", 1)]
        assert preemptions(served) == {"outgrown": 1, "evicted": 0}

    run(loaded, body, build=watched.build(STORAGES["slabs"]), promised_tokens=2)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda answer: [answer[0] + 1],
        lambda answer: [answer[0], (answer[1] + 1), *answer[2:6]],
        lambda answer: answer[:ANSWER],
        lambda answer: [*answer, *answer],
        lambda answer: [*answer[:4], 1 << 31],
        lambda answer: [*answer[:4], 10**9, answer[5]],
    ],
    ids=["other first", "other second", "all of it", "more than all", "no token at all", "no token in the middle"],
)
def test_what_cannot_have_been_delivered_ends_the_request(
    loaded: LoadedModel, shipment: Shipment, wrong: Callable[[list[int]], list[int]], early: bool
) -> None:
    parcel = ahead(loaded, shipment, 2)

    async def body(served: Served) -> None:
        stream = served.stream()
        await go_on(served, parcel, stream, 1, wrong(answer_of(shipment)), early=early)
        (update,) = await stream.finished(1)
        assert (update.error.code, update.error.reason) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], "DELIVERED")
        await served.nothing_is_held()
        await go_on(served, parcel, stream, 2, answer_of(shipment)[:5])
        assert await stream.tokens(2) == answer_of(shipment)[5:]

    run(loaded, body)


@storages
@pytest.mark.parametrize("how", ["cancel", "release", "stream break"])
def test_who_ends_during_a_replay_is_gone_after_its_pass(
    loaded: LoadedModel, shipment: Shipment, parcel: Ahead, storage: str, how: str
) -> None:
    answer, watched = answer_of(shipment), Watched()

    async def body(served: Served) -> None:
        held, entered, loop, replay = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop(), watched.replay

        def waiting(each: Any, number: int) -> None:
            loop.call_soon_threadsafe(entered.set)
            asyncio.run_coroutine_threadsafe(held.wait(), loop).result(15)
            replay(each, number)

        watched.replay = waiting  # type: ignore[method-assign]
        stream = served.stream()
        token = await go_on(served, parcel, stream, 1, answer[:14])
        await entered.wait()
        if how == "cancel":
            await stream.cancel(1)
        elif how == "release":
            served.worker.runner.end_all(served.held.find(token))
        else:
            await stream.close()
        await until(lambda: not list(served.held))
        assert served.held_bytes(), "the step thread uses the memory"
        held.set()
        await served.nothing_is_held()
        assert watched.passes == [("replay", 4)]
        assert stream.updates(1) == []

    run(loaded, body, build=watched.build(STORAGES[storage]), max_num_seqs=4)


@storages
def test_a_replay_that_fails_ends_its_sequence_alone(
    loaded: LoadedModel, shipment: Shipment, parcel: Ahead, storage: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer, watched = answer_of(shipment), Watched()

    async def body(served: Served) -> None:
        def failing(each: Any, number: int) -> None:
            raise RuntimeError("secret detail")

        stream, replay = served.stream(), watched.replay
        watched.replay = failing  # type: ignore[method-assign]
        await go_on(served, parcel, stream, 1, how=sampling(60))
        await until(lambda: stream.updates(1))
        await go_on(served, parcel, stream, 2, answer[:9])
        (update,) = await stream.finished(2)
        assert update.error.code == grpc.StatusCode.INTERNAL.value[0]
        assert "secret" not in update.error.message
        watched.replay = replay  # type: ignore[method-assign]
        await go_on(served, parcel, stream, 3, answer[:9])
        assert await stream.tokens(3) == answer[9:]
        assert await stream.tokens(1) == shipment.tokens(59)
        await served.nothing_is_held()

    run(loaded, body, build=watched.build(STORAGES[storage]))
    assert "secret detail" in caplog.text


def test_a_step_that_fails_leaves_those_that_replay(loaded: LoadedModel, shipment: Shipment, parcel: Ahead) -> None:
    """They have no part in it."""
    answer, watched = answer_of(shipment), Watched()

    async def body(served: Served) -> None:
        stream, held = served.stream(), asyncio.Event()
        entered, step = hold_steps(watched, held), watched.step
        await go_on(served, parcel, stream, 1, how=sampling(60))
        await entered()

        def failing(batch: Any) -> list[int]:
            watched.step = step  # type: ignore[method-assign]
            raise RuntimeError("a bug")

        await go_on(served, parcel, stream, 2, answer[:14])
        await until(lambda: served.worker.servicer._scheduler.waiting == 1)
        watched.step = failing  # type: ignore[method-assign]
        held.set()
        assert await stream.tokens(2) == answer[14:]
        assert (await stream.finished(1))[-1].error.code == grpc.StatusCode.INTERNAL.value[0]
        assert watched.replays == [5, 5, 3]

    run(loaded, body, build=watched.build(STORAGES["slabs"]), max_num_seqs=5)
