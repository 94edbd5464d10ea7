"""A worker that leaves tells its readers, who move what it holds; it waits for the rest."""

from __future__ import annotations

import asyncio

import pytest
from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker.worker import LoadedModel
from tests.unit.decode_worker.scripted import deliver, scripted
from tests.unit.decode_worker.serving import Served, TokenStream, run, until
from tests.unit.decode_worker.shipment import Shipment


def told(stream: TokenStream) -> list[bool]:
    return [message.draining for message in stream.messages]


def test_every_reader_hears_it_once(loaded: LoadedModel) -> None:
    async def body(served: Served) -> None:
        first, second, gone = (served.stream() for _ in range(3))
        await until(lambda: len(served.worker.servicer._outboxes) == 3)
        await gone.close()
        await until(lambda: len(served.worker.servicer._outboxes) == 2)
        assert not first.messages
        await served.worker.drain(15)
        await until(lambda: first.messages and second.messages)
        late = served.stream()
        await until(lambda: late.messages)
        await served.worker.drain(15)
        await served.info()
        assert [told(stream) for stream in (first, second, late, gone)] == [[True], [True], [True], []]
        assert not any(message.updates for message in first.messages)

    run(loaded, body)


def test_a_drain_with_nothing_held_is_over_at_once(loaded: LoadedModel) -> None:
    """Whoever reads: a stream holds nothing."""

    async def body(served: Served) -> None:
        stream = served.stream()
        await until(lambda: served.worker.servicer._outboxes)
        draining = asyncio.create_task(served.worker.drain(3600))
        await asyncio.wait_for(draining, 5)
        await until(lambda: told(stream) == [True])

    run(loaded, body)


@pytest.mark.parametrize("how", ["cancel", "release"])
def test_what_was_moved_is_free_at_once_and_ends_the_drain(loaded: LoadedModel, shipment: Shipment, how: str) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        stream = served.stream()
        token = await deliver(served, shipment, max_new_tokens=30)
        engine.gate.shut()
        await stream.attach(1, token)
        await engine.gate.reached()
        drain = asyncio.create_task(served.worker.drain(3600))
        await until(lambda: True in told(stream))
        assert not drain.done()
        if how == "cancel":
            await stream.cancel(1)
        else:
            await served.decode.Release(pb.ReleaseRequest(token=token))
        await until(lambda: not list(served.held))
        engine.gate.open()
        await asyncio.wait_for(drain, 5)
        await served.nothing_is_held()
        assert not stream.updates(1), "the answer goes on elsewhere"
        assert len(engine.batches) == 1

    run(model, body)


def test_answers_go_on_meanwhile(loaded: LoadedModel, shipment: Shipment) -> None:
    """Who has nowhere to go finishes here; what is due to arrive does so, too."""

    async def body(served: Served) -> None:
        stream = served.stream()
        early = await deliver(served, shipment, "early")
        drain = asyncio.create_task(served.worker.drain(15))
        await until(lambda: told(stream) == [True])
        await stream.attach(1, early)
        assert await stream.tokens(1) == shipment.expected
        await drain

    run(loaded, body)
