"""A step waits for nothing: not for a copy into or out of the pool, not for the event loop, not for text."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.worker import LoadedModel
from shared.model.text_stream import TextStream
from tests.unit.decode_worker.scripted import WAIT_S, Gate, ScriptedEngine, deliver, held_installs, scripted
from tests.unit.decode_worker.serving import Served, run, until
from tests.unit.decode_worker.shipment import MAX_NEW_TOKENS, Shipment

STEPS = MAX_NEW_TOKENS - 1


def steps_of(engine: ScriptedEngine, seed: int) -> int:
    return sum(seed in batch for batch in engine.batches)


def test_a_parcel_that_is_copied_in_stops_nobody(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = scripted(loaded)
    installs = held_installs(monkeypatch)

    async def body(served: Served) -> None:
        stream = served.stream()
        engine.gate.shut()
        await stream.attach(1, await deliver(served, shipment, "first", seed=1))
        await engine.gate.reached()
        installs.shut()
        second = asyncio.create_task(deliver(served, shipment, "second", seed=2))
        await installs.reached()
        engine.gate.open()
        assert len(await stream.tokens(1)) == STEPS, "all of its steps and their tokens"
        assert not second.done()
        installs.open()
        await stream.attach(2, await second)
        assert len(await stream.tokens(2)) == STEPS

    run(model, body)


def test_a_sequence_that_is_moved_out_stops_nobody(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that promised little waits for its copy; the other's room was promised."""
    model, engine = scripted(loaded)
    exports, export = Gate(), SlabPool.export

    def waiting(*args: Any) -> Any:
        exports.pass_through()
        return export(*args)

    monkeypatch.setattr(SlabPool, "export", waiting)

    async def body(served: Served) -> None:
        stream = served.stream()
        engine.gate.shut()
        exports.shut()
        await stream.attach(1, await deliver(served, shipment, "long", seed=1))
        await engine.gate.reached()
        await stream.attach(2, await deliver(served, shipment, "short", seed=2, max_new_tokens=4))
        await until(lambda: served.worker.servicer._scheduler.waiting == 1)
        engine.gate.open()
        await exports.reached()
        assert len(await stream.tokens(2)) == 3
        assert steps_of(engine, 1) == 3
        exports.open()
        assert len(await stream.tokens(1)) == STEPS

    run(model, body, promised_tokens=3)


def test_a_busy_event_loop_stops_nobody(loaded: LoadedModel, shipment: Shipment) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        stream = served.stream()
        engine.gate.shut()
        await stream.attach(1, await deliver(served, shipment, seed=1))
        await engine.gate.reached()
        engine.gate.open()
        give_up = time.monotonic() + WAIT_S
        while steps_of(engine, 1) < STEPS:
            assert time.monotonic() < give_up, "the steps wait for the event loop"
            time.sleep(0.001)  # noqa: ASYNC251 - blocks the loop
        assert stream.updates(1) == []
        assert len(await stream.tokens(1)) == STEPS

    run(model, body)


def test_a_slow_detokeniser_stops_nobody(
    loaded: LoadedModel, shipment: Shipment, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = scripted(loaded)
    push, pushed = TextStream.push, list[int]()

    def slow(self: TextStream, token: int) -> str:
        give_up = time.monotonic() + WAIT_S
        while pushed and steps_of(engine, 1) < STEPS:
            assert time.monotonic() < give_up, "the steps wait for text"
            time.sleep(0.001)
        pushed.append(token)
        return push(self, token)

    async def body(served: Served) -> None:
        stream = served.stream()
        monkeypatch.setattr(TextStream, "push", slow)
        await stream.attach(1, await deliver(served, shipment, seed=1))
        assert len(await stream.tokens(1)) == STEPS
        assert len(pushed) == MAX_NEW_TOKENS

    run(model, body)


def test_a_cancelled_sequence_is_stepped_no_more_and_others_join_at_once(
    loaded: LoadedModel, shipment: Shipment
) -> None:
    """Both take effect with the step that follows."""
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        stream = served.stream()
        engine.gate.shut()
        await stream.attach(1, await deliver(served, shipment, "gone", seed=1))
        await engine.gate.reached()
        await stream.attach(2, await deliver(served, shipment, "new", seed=2))
        await until(lambda: served.worker.servicer._scheduler.waiting == 1)
        await stream.cancel(1)
        await until(lambda: len(list(served.held)) == 1)
        engine.gate.open()
        assert len(await stream.tokens(2)) == STEPS
        assert engine.batches == [[1], *[[2]] * STEPS]

    run(model, body)
