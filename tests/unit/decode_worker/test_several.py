"""Several answers of one parcel behind real gRPC: the tokens of each are those of a worker that draws it alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import grpc
import pytest
from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker.answers import Stage
from decode_worker.engine import EagerEngine
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.sequence import Sequence as Running
from decode_worker.worker import LoadedModel
from shared.kv.eviction import FixedSlot
from shared.kv.extents import aligned
from shared.kv.manifest import BegunAnswer, Manifest
from shared.model.sampler import Sampler
from shared.request.sampling import Sampling
from shared.rpc.status import from_rpc_error
from tests.unit.decode_worker.failover import Ahead, ahead
from tests.unit.decode_worker.sequences import LAYOUT, advance, pooled, some
from tests.unit.decode_worker.serving import Served, TokenStream, failure, frames, run, until
from tests.unit.decode_worker.shipment import Shipment
from tests.unit.decode_worker.test_preemption import STORAGES, leave_room_for, only_that_is_left, preemptions

TOKENS = 24
HOT = Sampling(max_new_tokens=TOKENS, ignore_eos=True, temperature=1.3, seed=6, n=8)
GREEDY = Sampling(max_new_tokens=TOKENS, ignore_eos=True, n=8)
BOUND = 40
# the first tokens of answers but the first
FIRST = {1: 17, 2: 33, 5: 40}


def manifest(parcel: Ahead, name: str, how: Sampling, others: Mapping[int, int], **changes: Any) -> Manifest:
    begun = tuple(BegunAnswer(choice, token) for choice, token in others.items())
    return parcel.manifest(name, 1, how, others=begun, **changes)


def expected(loaded: LoadedModel, shipment: Shipment, how: Sampling, choice: int, first: int) -> list[int]:
    """A whole answer, drawn alone."""
    pool, prompt = SlabPool(1 << 20, loaded.identity.layout), shipment.prompt
    steps = how.max_new_tokens - 1
    each = Running(
        kv=pooled(pool, prompt, some(3, prompt.num_tokens), steps),
        sampler=Sampler(how.of_choice(choice), frozenset()),
        last_token=first,
        next_position=prompt.num_tokens,
    )
    engine, tokens = EagerEngine(loaded.model, pool), [first]
    for _ in range(steps):
        advance([each], engine.step([each]))
        tokens.append(each.last_token)
    return tokens


def whole(loaded: LoadedModel, shipment: Shipment, how: Sampling, others: Mapping[int, int]) -> dict[int, list[int]]:
    firsts = {0: shipment.prompt.first_token, **others}
    return {choice: expected(loaded, shipment, how, choice, first) for choice, first in firsts.items()}


def asked(choices: Sequence[int], delivered: Mapping[int, int] | None = None) -> list[pb.ReservedAnswer]:
    told = delivered or {}
    return [pb.ReservedAnswer(choice=choice, delivered_tokens=told.get(choice, 0)) for choice in choices]


async def reserve(served: Served, name: str, choices: Sequence[int], **changes: Any) -> pb.ReserveResponse:
    values: dict[str, Any] = {"request_id": name, "kept_tokens_bound": BOUND, "max_new_tokens": TOKENS}
    return await served.reserve(**(values | {"answers": asked(choices)} | changes))


async def begin(
    served: Served, parcel: Ahead, stream: TokenStream, name: str, how: Sampling, others: Mapping[int, int], handle: int
) -> bytes:
    """Reserved, delivered and attached; choice i under `handle` + i."""
    while True:
        try:
            promise = await reserve(served, name, [0, *others])
            break
        except grpc.aio.AioRpcError as error:
            if from_rpc_error(error).reason != "KV_FULL":
                raise
            await asyncio.sleep(0.005)
    sent = manifest(parcel, name, how, others)
    await served.put(frames(promise.token, sent, parcel.body))
    known = list(parcel.generated)
    for choice in (0, *others):
        given = known if choice == 0 else [others[choice]]
        await stream.attach(handle + choice, promise.token, given, choice)
    return promise.token


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("drawn", [1, 4])
@pytest.mark.parametrize("how", [HOT, GREEDY], ids=["sampled", "greedy"])
def test_each_answer_is_drawn_as_if_it_were_alone(
    loaded: LoadedModel, shipment: Shipment, storage: str, drawn: int, how: Sampling
) -> None:
    """Of the first, some tokens were drawn ahead: their rows are no other's."""
    alone = whole(loaded, shipment, how, FIRST)
    ahead_how = {} if how is GREEDY else {"temperature": how.temperature, "seed": how.seed}
    parcel = ahead(loaded, shipment, drawn, **ahead_how)
    assert list(parcel.generated) == alone[0][:drawn]

    async def body(served: Served) -> None:
        stream = served.stream()
        await begin(served, parcel, stream, "r", how, FIRST, 10)
        for choice, tokens in alone.items():
            assert await stream.tokens(10 + choice) == tokens[drawn if choice == 0 else 1 :]
        await served.nothing_is_held()

    run(loaded, body, build=STORAGES[storage])


def test_the_kept_tokens_are_promised_and_held_once(loaded: LoadedModel, shipment: Shipment) -> None:
    parcel = ahead(loaded, shipment, 1)

    async def body(served: Served) -> None:
        pool, token_bytes = served.worker.runner._pool, loaded.identity.layout.token_bytes
        promise = await reserve(served, "r", [0, *FIRST])
        room = (TOKENS - 1) * token_bytes
        assert promise.reserved_bytes == aligned(BOUND * token_bytes) + 4 * aligned(room)
        assert served.held_bytes() == {"reserved": promise.reserved_bytes}
        await served.put(frames(promise.token, manifest(parcel, "r", HOT, FIRST), parcel.body))
        kept = pool.sequence_bytes(shipment.num_kept, 0)
        assert served.held_bytes() == {"active": aligned(kept) + 4 * aligned(room)}
        copies = await reserve(served, "s", [0, *FIRST], copies=True)
        assert copies.reserved_bytes == 4 * aligned((BOUND + TOKENS - 1) * token_bytes)
        for token in (promise.token, copies.token):
            served.worker.runner.end_all(served.held.find(token))

    run(loaded, body)


@pytest.mark.parametrize("how", ["cancel", "stream break"])
def test_one_that_ends_gives_its_own_rows_back_and_the_others_go_on(
    loaded: LoadedModel, shipment: Shipment, how: str
) -> None:
    alone, parcel = whole(loaded, shipment, HOT, FIRST), ahead(loaded, shipment, 1, temperature=1.3, seed=6)

    async def body(served: Served) -> None:
        stream, other = served.stream(), served.stream()
        promise = await reserve(served, "r", [0, *FIRST])
        await served.put(frames(promise.token, manifest(parcel, "r", HOT, FIRST), parcel.body))
        before = served.held.bytes_in(Stage.ACTIVE)
        await other.attach(0, promise.token, choice=0)
        await until(lambda: other.updates(0))
        if how == "cancel":
            await other.cancel(0)
        else:
            await other.close()
        room = aligned((TOKENS - 1) * loaded.identity.layout.token_bytes)
        await until(lambda: served.held.bytes_in(Stage.ACTIVE) == before - room)
        assert served.held.orphan_bytes == 0
        for choice in FIRST:
            await stream.attach(choice, promise.token, choice=choice)
        for choice in FIRST:
            assert await stream.tokens(choice) == alone[choice][1:]
        await served.nothing_is_held()

    run(loaded, body)


def test_an_answer_may_end_while_its_parcel_comes_and_one_may_not_come_at_all(
    loaded: LoadedModel, shipment: Shipment
) -> None:
    alone, parcel = whole(loaded, shipment, HOT, FIRST), ahead(loaded, shipment, 1)

    async def body(served: Served) -> None:
        stream = served.stream()
        promise = await reserve(served, "r", [0, 1, 2, 5, 7])
        for choice in (0, 1, 2, 5, 7):
            await stream.attach(choice, promise.token, choice=choice)
        sent = frames(promise.token, manifest(parcel, "r", HOT, FIRST), parcel.body, chunk=100)
        call = served.open_put()
        for frame in sent[:3]:
            await call.write(frame)
        await until(lambda: served.held.bytes_in(Stage.FILLING))
        await stream.cancel(2)
        await until(lambda: 2 not in served.held.find(promise.token).answers)
        assert served.held.bytes_in(Stage.FILLING) == promise.reserved_bytes, "it is being written"
        for frame in sent[3:]:
            await call.write(frame)
        await call.done_writing()
        await call
        (last,) = await stream.finished(7)
        assert last.error.reason == "NO_ANSWER"
        for choice in (0, 1, 5):
            assert await stream.tokens(choice) == alone[choice][1:]
        await stream.attach(99, promise.token, choice=1)
        assert (await stream.finished(99))[0].error.reason == "NO_RESERVATION"
        await served.nothing_is_held()

    run(loaded, body)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("drawn", [1, 4])
@pytest.mark.parametrize("left", [(1, 5), (0, 2), (2,), (0,)])
def test_those_that_are_left_go_on_behind_what_was_delivered(
    loaded: LoadedModel, shipment: Shipment, storage: str, drawn: int, left: tuple[int, ...]
) -> None:
    """The parcel brings all that began; the others have ended since."""
    alone = whole(loaded, shipment, HOT, FIRST)
    parcel = ahead(loaded, shipment, drawn, temperature=HOT.temperature, seed=HOT.seed)

    async def body(served: Served) -> None:
        stream = served.stream()
        cuts = {choice: 6 + choice for choice in left}
        promise = await reserve(served, "r", left, answers=asked(left, cuts))
        await served.put(frames(promise.token, manifest(parcel, "r", HOT, FIRST), parcel.body))
        for choice, cut in cuts.items():
            await stream.attach(choice, promise.token, alone[choice][:cut], choice)
        for choice, cut in cuts.items():
            assert await stream.tokens(choice) == alone[choice][cut:]
        await served.nothing_is_held()

    run(loaded, body, build=STORAGES[storage], promised_tokens=5)


@pytest.mark.parametrize("storage", STORAGES)
def test_who_outgrows_its_promise_parks_by_itself(loaded: LoadedModel, shipment: Shipment, storage: str) -> None:
    """Three families in room for little more than one; some of their members leave in the middle."""
    alone = whole(loaded, shipment, HOT, FIRST)
    parcel = ahead(loaded, shipment, 2, temperature=HOT.temperature, seed=HOT.seed)

    async def body(served: Served) -> None:
        ballast = await leave_room_for(served, shipment, sequences=2.2)
        stream = served.stream()
        names = ("a", "b", "c")
        handles = {name: 100 * number for number, name in enumerate(names)}
        await asyncio.gather(
            *(begin(served, parcel, stream, name, HOT, FIRST, handles[name]) for name in names),
            until(lambda: any(answer.parked for answer in served.held.answers)),
        )
        await stream.cancel(handles["b"] + 2)
        for name in names:
            for choice, tokens in alone.items():
                if (name, choice) != ("b", 2):
                    assert await stream.tokens(handles[name] + choice) == tokens[2 if choice == 0 else 1 :]
        assert preemptions(served)["outgrown"] >= 3
        await only_that_is_left(served, ballast)

    run(loaded, body, build=STORAGES[storage], promised_tokens=2, max_num_seqs=8)


# a parcel is installed in five pieces: what is shared, and what each answer has for itself
@pytest.mark.parametrize(("fails", "call"), [("export", 1), ("install", 6)])
def test_a_copy_that_fails_ends_all_that_might_read_it(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch, fails: str, call: int
) -> None:
    parcel, calls = ahead(loaded, shipment, 2), list[object]()
    method = getattr(SlabPool, fails)

    def failing(*args: Any, **more: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise MemoryError("no host memory")
        return method(*args, **more)

    monkeypatch.setattr(SlabPool, fails, failing)

    async def body(served: Served) -> None:
        stream = served.stream()
        promise = await reserve(served, "r", [0, *FIRST])
        for choice in (0, *FIRST):
            await stream.attach(choice, promise.token, choice=choice)
        await until(lambda: all(answer.subscription for answer in served.held.answers))
        await served.put(frames(promise.token, manifest(parcel, "r", GREEDY, FIRST), parcel.body))
        for choice in (0, *FIRST):
            assert (await stream.finished(choice))[-1].error.reason == "INTERNAL"
        await served.nothing_is_held()

    run(loaded, body, promised_tokens=3)


def test_a_larger_promise_keeps_what_is_shared_shared(loaded: LoadedModel) -> None:
    async def body(served: Served) -> None:
        pool, token_bytes = served.worker.runner._pool, loaded.identity.layout.token_bytes
        for copies in (False, True):
            promise = await reserve(served, str(copies), [0, 1, 2], copies=copies)
            grown = pb.GrowReservationRequest(token=promise.token, kept_tokens_bound=BOUND + 8)
            more = (await served.decode.GrowReservation(grown)).reserved_bytes - promise.reserved_bytes
            assert more == (3 if copies else 1) * 8 * token_bytes
            grown.kept_tokens_bound = pool.capacity // token_bytes // (4 if copies else 1) - 80
            ballast = await reserve(served, "ballast", [0], kept_tokens_bound=pool.capacity // token_bytes // 2)
            assert (await failure(served.decode.GrowReservation(grown))).reason == "KV_FULL"
            assert served.held.find(promise.token).pool_bytes == promise.reserved_bytes + more
            for token in (promise.token, ballast.token):
                served.worker.runner.end_all(served.held.find(token))

    run(loaded, body)


@pytest.mark.parametrize("answers", [asked([0, 0]), asked([16])])
def test_answers_that_no_request_has_are_refused(loaded: LoadedModel, answers: list[pb.ReservedAnswer]) -> None:
    async def body(served: Served) -> None:
        assert (await failure(reserve(served, "r", [], answers=answers))).code == "INVALID_ARGUMENT"

    run(loaded, body)


@pytest.mark.parametrize(
    ("choices", "changes", "reason"),
    [
        ([3, 4], {}, "NOTHING_TO_GENERATE"),
        (
            [0, 1],
            {"eviction": FixedSlot(retention=(Fraction(1),) * LAYOUT.num_layers, distance=-5)},
            "OVER_RESERVATION",
        ),
        ([0, 1], {"others": (BegunAnswer(2, 9), BegunAnswer(1, 9))}, "PARCEL_MANIFEST"),
        ([0, 1], {"others": (BegunAnswer(8, 9),)}, "PARCEL_MANIFEST"),
        ([0, 1], {"others": (BegunAnswer(1, 1 << 20),)}, "UNKNOWN_TOKEN"),
    ],
)
def test_parcels_of_other_answers_are_refused(
    loaded: LoadedModel, shipment: Shipment, choices: list[int], changes: dict[str, Any], reason: str
) -> None:
    parcel = ahead(loaded, shipment, 1)

    async def body(served: Served) -> None:
        promise = await reserve(served, "r", choices)
        sent = parcel.manifest("r", 1, HOT, **({"others": (BegunAnswer(1, 9),)} | changes))
        assert (await failure(served.put(frames(promise.token, sent, parcel.body)))).reason == reason
        served.worker.runner.end_all(served.held.find(promise.token))

    run(loaded, body)
