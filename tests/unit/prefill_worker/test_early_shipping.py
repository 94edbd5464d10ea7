"""From the pass to the decode worker's pool: rows that leave early arrive as if they had not, whatever goes wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_worker.config import DecodeConfig
from decode_worker.worker import LoadedModel, load_model
from prefill_worker.compression.eviction import parcel_bound
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.registry import build_policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import Compressed, Event, FirstToken, PrefillJob, Retained, Transferred
from prefill_worker.kv_sender import KVSender, Ticket
from prefill_worker.parcel import early_rows
from prefill_worker.parcel.early_rows import EarlyRows
from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.parcel.store import ParcelStore
from prefill_worker.parcel.wire_stage import WrittenBody
from prefill_worker.prompt import Prompt, PromptBuilder
from prefill_worker.runner import PrefillRunner
from prefill_worker.scheduler import PrefillScheduler
from shared.errors import AbortedError, DataLossError, ServiceError
from shared.kv.arena import Arena
from shared.kv.manifest import Manifest, TransferId
from shared.kv.transport import early_stream
from shared.kv.transport.base import Parcel, SendReport
from shared.kv.transport.grpc_stream import GrpcTransport
from shared.model.grammars import Grammars
from shared.model.identity import ModelIdentity
from shared.model.loading import load_spec
from shared.request.params import Budget, Wire
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.serving import EPOCH, Served, flipped, until
from tests.unit.decode_worker.serving import run as run_decode
from tests.unit.decode_worker.tiny import tokenizer
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user
from tests.unit.prefill_worker.test_early_rows import MONOTONE

ARENA_BYTES = 1 << 20
POLICY = build_policy("vl_cache", {})


class Prefills:
    """A prefill worker's runner around the real compute and the real sender; the prompt is always the same."""

    def __init__(self, compute: PrefillCompute, prompt: Prompt, served: Served, *, ships_early: bool = True) -> None:
        self._prompt, self._served, self.layout = prompt, served, compute._identity.layout
        self.arena = Arena(ARENA_BYTES)
        self.store = ParcelStore(self.arena)
        self.retained = RetainedParcels(self.store, capacity=ARENA_BYTES, lease_s=30.0)
        self.metrics = PrefillMetrics(worker="p", model="tiny")
        self.sender = KVSender(epoch=EPOCH, metrics=self.metrics, ships_early=ships_early)
        self.runner = PrefillRunner(
            preprocess=self,  # type: ignore[arg-type]
            compute=compute,
            scheduler=PrefillScheduler(max_waiting=4),
            store=self.store,
            retained=self.retained,
            sender=self.sender,
            layout=self.layout,
            metrics=self.metrics,
            grammars=Grammars(None, vocabulary=1, eos_token_ids=()),
        )

    async def build(self, messages: Any, *, max_new_tokens: int, tenant: str) -> Prompt:
        return self._prompt

    async def job(self, policy: Policy = POLICY, request_id: str = "r", **changes: Any) -> PrefillJob:
        """One with a reservation."""
        shape, budget = self._prompt.shape, Budget(retention=0.4)
        bound = budget.kept_tokens_bound(shape.num_tokens - shape.num_visual, shape.num_visual)
        promise = await self._served.reserve(request_id=request_id, kept_tokens_bound=bound)
        ticket = Ticket(
            decode_worker="d", address=self._served.address, token=promise.token, transport="grpc", lease_s=30.0
        )
        return dataclasses.replace(
            plain_job(),
            transfer=TransferId(request_id=request_id, attempt=1, prefill_epoch=EPOCH),
            sampling=Sampling(max_new_tokens=8, ignore_eos=True),
            budget=budget,
            policy=policy,
            ticket=ticket,
            **changes,
        )

    async def run(self, work: PrefillJob) -> list[Event]:
        return [event async for event in self.runner.stream(work)]

    async def close(self) -> None:
        await until(lambda: not self.runner._jobs)
        self.runner.check_integrity()
        await self.runner.drain(0)
        self.runner.close()
        await self.sender.close()
        self.arena.close()


Test = Callable[[Prefills, Served], Awaitable[None]]


class World:
    """What tests need to run against a decode worker."""

    def __init__(self, compute: PrefillCompute, prompt: Prompt, loaded: LoadedModel) -> None:
        self.compute, self._prompt, self._loaded = compute, prompt, loaded

    def run(self, test: Test, **options: Any) -> None:
        async def body(served: Served) -> None:
            prefills = Prefills(self.compute, self._prompt, served, **options)
            try:
                await test(prefills, served)
            finally:
                await prefills.close()

        run_decode(self._loaded, body)

    def parcel(self, work: PrefillJob) -> bytes:
        """The KV that the job's parcel has if nothing leaves early."""
        shape = self._prompt.shape
        bound = work.rows_bound(shape.num_tokens - shape.num_visual, shape.num_visual)
        body = memoryview(bytearray(parcel_bound(work.policy, self.compute._identity.layout, bound)))
        complete = self.compute.run(work, self._prompt, body, list[Event]().append)
        assert complete is not None
        return bytes(body[: complete().kv_bytes])


@pytest.fixture(scope="module")
def world(engine: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> World:
    spec = load_spec(checkpoint, torch.float32)
    identity = ModelIdentity.of("tiny", checkpoint, spec)
    metrics = PrefillMetrics(worker="p", model="tiny")
    compute = PrefillCompute(engine, tokenizer(), spec, identity, metrics, cascade=True)
    prompt = builder.build([user(encoded(picture(1)), encoded(picture(2)), QUESTION)], max_new_tokens=8)
    return World(
        compute, prompt, load_model(DecodeConfig(model=str(checkpoint), served_model_name="tiny", dtype="float32"))
    )


@pytest.fixture(autouse=True)
def _every_row_is_a_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_rows, "MIN_WAVE_BYTES", 1)


@pytest.fixture
def no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever arrives began to leave early."""

    async def send(self: GrpcTransport, parcel: Parcel, token: bytes) -> SendReport:
        raise AssertionError("nothing had left early")

    monkeypatch.setattr(GrpcTransport, "send", send)


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Passes wait for it after their first wave."""
    go_on, ship = threading.Event(), EarlyRows._ship

    def pausing(self: EarlyRows, layers: Any) -> None:
        ship(self, layers)
        assert go_on.wait(10)

    monkeypatch.setattr(EarlyRows, "_ship", pausing)
    return go_on


def installed(served: Served, work: PrefillJob) -> bytes:
    (answer,) = served.held.find(work.ticket.token).answers.values()
    assert answer.sequence is not None
    return bytes(served.worker.runner._pool.export(answer.sequence.kv).body)


def release(served: Served, work: PrefillJob) -> None:
    served.worker.runner.end_all(served.held.find(work.ticket.token))


@pytest.mark.usefixtures("no_other_way")
@pytest.mark.parametrize("policy", MONOTONE, ids=lambda policy: repr(policy)[:60])
def test_the_decode_worker_has_what_it_would_have(world: World, policy: Policy) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job(policy)
        events = await prefills.run(work)
        assert [type(event) for event in events] == [FirstToken, Compressed, Retained, Transferred]
        assert installed(served, work) == world.parcel(work)
        sent = events[-1]
        assert isinstance(sent, Transferred)
        assert sent.transport == "grpc"
        assert sent.sent_bytes > len(world.parcel(work))
        release(served, work)

    world.run(test)


@pytest.mark.parametrize("changes", [{"wire": Wire(bits=8, group=8, residual=4)}, {"policy": build_policy("cake", {})}])
def test_what_cannot_leave_early_goes_as_ever(
    world: World, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job(**changes)
        assert isinstance((await prefills.run(work))[-1], Transferred)
        release(served, work)

    monkeypatch.setattr(early_stream.EarlyStream, "add", _raise(AssertionError("it left early")))
    world.run(test)


@pytest.mark.parametrize(("transport", "ships_early"), [("memory", True), ("local", True), ("grpc", False)])
def test_only_what_travels_can_leave_early_and_only_where_it_may(
    world: World, transport: str, ships_early: bool
) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        ticket = dataclasses.replace(work.ticket, transport=transport)
        async with prefills.sender.early(ticket, prefills.runner._parcel_thread) as early:
            assert early is None
        if transport == "grpc":
            await prefills.run(work)
            assert installed(served, work) == world.parcel(work)
        release(served, work)

    world.run(test, ships_early=ships_early)


def test_rows_arrive_while_the_pass_goes_on(world: World, paused: threading.Event) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        task = asyncio.create_task(prefills.run(work))
        await until(lambda: "filling" in served.held_bytes())
        assert not task.done()
        paused.set()
        await task
        assert installed(served, work) == world.parcel(work)
        release(served, work)

    world.run(test)


def test_who_leaves_during_the_pass_leaves_nothing(world: World, paused: threading.Event) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        before = served.held_bytes()
        task = asyncio.create_task(prefills.run(work))
        await until(lambda: "filling" in served.held_bytes())
        task.cancel()
        paused.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: served.held_bytes() == before and not prefills.runner._jobs)
        assert not prefills.store.used_bytes
        # the reservation is as good as before
        again = dataclasses.replace(work, cancelled=threading.Event())
        await prefills.run(again)
        assert installed(served, again) == world.parcel(again)
        release(served, again)

    world.run(test)


def test_a_pass_that_fails_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        before = served.held_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(EarlyRows, "placed", _raise(RuntimeError("a bug")))
            with pytest.raises(RuntimeError, match="a bug"):
                await prefills.run(work)
        await until(lambda: served.held_bytes() == before and not prefills.runner._jobs)
        assert not prefills.store.used_bytes
        await prefills.run(work)
        release(served, work)

    world.run(test)


def test_an_answer_of_one_token_takes_back_what_has_left(world: World) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        before = served.held_bytes()
        one = dataclasses.replace(work, sampling=Sampling(max_new_tokens=1))
        assert [type(event) for event in await prefills.run(one)] == [FirstToken]
        await until(lambda: served.held_bytes() == before)
        release(served, work)

    world.run(test)


def test_a_request_that_ends_during_the_pass_is_not_revived(world: World, paused: threading.Event) -> None:
    """Its parcel stays retained, for another decode worker."""

    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        task = asyncio.create_task(prefills.run(work))
        await until(lambda: "filling" in served.held_bytes())
        release(served, work)
        await served.nothing_is_held()
        paused.set()
        with pytest.raises(AbortedError) as caught:
            await task
        assert caught.value.reason == "RELEASED"
        assert prefills.retained.used_bytes > 0
        await served.nothing_is_held()

    world.run(test)


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_bytes_that_were_lost_are_sent_again_whole(world: World, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    encode, sent = early_stream.encode_chunk, list[int]()

    def damaging(offset: int, data: memoryview) -> bytes:
        sent.append(offset)
        frame = encode(offset, data)
        return flipped(frame) if len(sent) == chunk + 1 else frame

    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        await prefills.run(work)
        assert len(sent) > chunk
        assert installed(served, work) == world.parcel(work)
        resends = prefills.metrics.labelled(prefills.metrics.resends, reason="data_loss")
        assert resends._value.get() == 1
        release(served, work)

    monkeypatch.setattr(early_stream, "encode_chunk", damaging)
    monkeypatch.setattr("decode_worker.kv_receiver.DISCARD_TIMEOUT_S", 0.05)
    world.run(test)


def test_a_refusal_reaches_the_caller(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parcel that is always damaged, whichever way it takes."""

    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        before = served.held_bytes()
        with pytest.raises(DataLossError) as caught:
            await prefills.run(work)
        assert caught.value.reason == "PARCEL_DIGEST"
        assert served.held_bytes() == before
        release(served, work)

    def complete(draft: Manifest, written: WrittenBody) -> Manifest:
        written.arrival()
        return dataclasses.replace(draft, digest=b"another")

    monkeypatch.setattr("prefill_worker.compute._complete", complete)
    world.run(test)


def test_a_bug_while_sending_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        before = served.held_bytes()
        with pytest.raises(RuntimeError, match="a bug"):
            await prefills.run(work)
        await until(lambda: served.held_bytes() == before)
        release(served, work)

    monkeypatch.setattr(early_rows, "last_wave", _raise(RuntimeError("a bug")))
    world.run(test)


def test_a_decode_worker_that_cannot_be_reached_fails_the_transfer_alone(world: World) -> None:
    async def test(prefills: Prefills, served: Served) -> None:
        work = await prefills.job()
        elsewhere = dataclasses.replace(work, ticket=dataclasses.replace(work.ticket, address="127.0.0.1:1"))
        with pytest.raises(ServiceError) as caught:
            await prefills.run(elsewhere)
        assert caught.value.code == "UNAVAILABLE"
        assert prefills.retained.used_bytes > 0
        release(served, work)

    world.run(test)


def _raise(error: Exception) -> Callable[..., Any]:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising
