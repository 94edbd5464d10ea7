"""What a reader hears: tokens, text without broken pieces, one reason at the end, and one message for all."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from vlcache.v1 import inference_pb2 as public

from decode_worker.worker import LoadedModel
from shared.request.sampling import Sampling
from tests.unit.decode_worker.scripted import deliver, scripted
from tests.unit.decode_worker.serving import Served, failure, frames, run, until
from tests.unit.decode_worker.shipment import Shipment
from tests.unit.decode_worker.tiny import tokenizer

EOS = tokenizer().eos_token_id
HANDLE = 3


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


RED, CIRCLE, SQUARE = (ids(f" {word}")[0] for word in ("red", "circle", "square"))
SMILE = ids("\N{GRINNING FACE}")
STOP, LENGTH = public.FINISH_REASON_STOP, public.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("answer", "sampling", "said", "text", "reason"),
    [
        ([RED, CIRCLE, RED], {"max_new_tokens": 4}, 3, " red circle red", LENGTH),
        ([RED, EOS, CIRCLE], {"ignore_eos": False}, 2, " red", STOP),
        ([RED, EOS, CIRCLE], {"max_new_tokens": 4}, 3, " red circle", LENGTH),
        ([RED, EOS], {"max_new_tokens": 3, "ignore_eos": False}, 2, " red", STOP),
        ([RED, CIRCLE, SQUARE], {"stop": ("rcl",)}, 2, " red ci", STOP),
        ([RED, CIRCLE, SQUARE], {"stop": ("le sq", "x")}, 3, " red circ", STOP),
        ([RED, CIRCLE, RED], {"stop": ("le sq",), "max_new_tokens": 4}, 3, " red circle red", LENGTH),
        ([RED, CIRCLE], {"stop": ("circle and",), "max_new_tokens": 3}, 2, " red circle", LENGTH),
        ([RED, CIRCLE, EOS], {"stop": ("circle and",), "ignore_eos": False}, 3, " red circle", STOP),
        ([*SMILE, RED], {"max_new_tokens": len(SMILE) + 2}, len(SMILE) + 1, "\N{GRINNING FACE} red", LENGTH),
    ],
)
def test_an_answer_ends_with_its_reason(
    loaded: LoadedModel,
    shipment: Shipment,
    answer: list[int],
    sampling: dict[str, Any],
    said: int,
    text: str,
    reason: int,
) -> None:
    model, engine = scripted(loaded)
    engine.answers[0] = answer

    async def body(served: Served) -> None:
        stream = served.stream()
        await stream.attach(HANDLE, await deliver(served, shipment, **({"max_new_tokens": 12} | sampling)))
        updates = await stream.finished(HANDLE)
        assert [token for update in updates for token in update.token_ids] == answer[:said]
        first_text = tokenizer().decode([shipment.prompt.first_token], skip_special_tokens=True)
        open_character = first_text.endswith("\ufffd")
        heard = "".join(update.text for update in updates)
        assert heard.endswith(text) if open_character else heard == text
        assert [update.finish_reason for update in updates] == [0] * (said - 1) + [reason]
        assert not any("\ufffd" in update.text for update in updates[1:])
        await served.nothing_is_held()
        await asyncio.sleep(0.02)
        assert len(stream.updates(HANDLE)) == said, "nothing follows the last update"

    run(model, body)


def test_text_that_may_become_a_stop_string_is_held_back(loaded: LoadedModel, shipment: Shipment) -> None:
    model, engine = scripted(loaded)
    engine.answers[0] = [RED, CIRCLE, RED, SQUARE]

    async def body(served: Served) -> None:
        stream = served.stream()
        await stream.attach(HANDLE, await deliver(served, shipment, max_new_tokens=5, stop=("circle and",)))
        updates = await stream.finished(HANDLE)
        assert [update.text for update in updates][1:] == [" ", "circle red", " square"]

    run(model, body)


def test_the_first_token_s_open_text_is_said_here(loaded: LoadedModel, shipment: Shipment) -> None:
    """The prefill worker said what was certain after the first token; the rest comes with the second."""
    model, engine = scripted(loaded)
    engine.answers[0] = [*SMILE[1:], RED]

    async def body(served: Served) -> None:
        stream, (first, *_) = served.stream(), SMILE
        promise = await served.reserve(max_new_tokens=len(SMILE) + 1)
        from_here = shipment.manifest(generated=(first,), sampling=Sampling(max_new_tokens=len(SMILE) + 1))
        await served.put(frames(promise.token, from_here, shipment.body))
        await stream.attach(HANDLE, promise.token)
        assert await stream.text(HANDLE) == "\N{GRINNING FACE} red"

    run(model, body)


def test_one_message_carries_the_step_of_all(loaded: LoadedModel, shipment: Shipment) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        stream, other = served.stream(), served.stream()
        engine.gate.shut()
        for handle in range(5):
            await stream.attach(handle, await deliver(served, shipment, str(handle), seed=handle))
        await other.attach(HANDLE, await deliver(served, shipment, "other", seed=9))
        await until(lambda: served.worker.servicer._scheduler.waiting == 5)
        engine.gate.open()
        for handle in range(5):
            await stream.finished(handle)
        await other.finished(HANDLE)
        assert sum(len(message.updates) for message in stream.messages) == 5 * 7
        assert len(stream.messages) <= len(engine.batches), "at most one message per step, not one per token"
        assert all(update.handle == HANDLE for message in other.messages for update in message.updates)
        assert len(other.updates(HANDLE)) == 7

    run(model, body)


def test_more_sequences_than_places_are_all_served(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        stream = served.stream()
        for handle in range(7):
            await stream.attach(handle, await deliver(served, shipment, str(handle)))
        for handle in range(7):
            assert await stream.tokens(handle) == shipment.expected
        await served.nothing_is_held()

    run(loaded, body, max_num_seqs=2)


def test_a_sampled_answer_is_the_one_of_its_seed(loaded: LoadedModel, shipment: Shipment) -> None:
    async def body(served: Served) -> None:
        stream, how = served.stream(), {"temperature": 1.4, "top_p": 0.9, "top_k": 50}
        for seed in (1, 2):
            await stream.attach(seed, await deliver(served, shipment, str(seed), seed=seed, **how))
        await stream.attach(3, await deliver(served, shipment, "greedy"))
        for seed in (1, 2):
            assert await stream.tokens(seed) == shipment.tokens(seed=seed, **how)
        assert await stream.tokens(3) == shipment.expected
        assert await stream.tokens(1) != await stream.tokens(2)

    run(loaded, body)


def test_a_failed_step_is_told_and_the_worker_goes_on(
    loaded: LoadedModel, shipment: Shipment, caplog: pytest.LogCaptureFixture
) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        stream, engine.error = served.stream(), RuntimeError("secret detail")
        engine.gate.shut()
        for handle in range(2):
            await stream.attach(handle, await deliver(served, shipment, str(handle), seed=handle))
        engine.gate.open()
        for handle in range(2):
            (update,) = await stream.finished(handle)
            assert update.error.code == grpc.StatusCode.INTERNAL.value[0]
            assert "secret" not in update.error.message
        await served.nothing_is_held()
        engine.error = None
        await stream.attach(9, await deliver(served, shipment))
        assert len(await stream.tokens(9)) == 7

    run(model, body)
    assert "secret detail" in caplog.text


def test_text_that_fails_ends_its_sequence_alone(
    loaded: LoadedModel, shipment: Shipment, caplog: pytest.LogCaptureFixture
) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        stream = served.stream()
        engine.gate.shut()
        for handle in range(3):
            token = await deliver(served, shipment, str(handle), seed=handle)
            await stream.attach(handle, token)
            if handle == 1:
                served.held.find(token).answers[0].text._decode = lambda tokens: 1 // 0  # type: ignore[union-attr]
        await engine.gate.reached()
        await until(lambda: served.worker.servicer._scheduler.waiting == 2)
        engine.gate.open()
        (update,) = await stream.finished(1)
        assert update.error.code == grpc.StatusCode.INTERNAL.value[0]
        for handle in (0, 2):
            assert len(await stream.tokens(handle)) == 7
        await served.nothing_is_held()

    run(model, body)
    assert "ZeroDivisionError" in caplog.text


def test_what_a_worker_says_about_itself(loaded: LoadedModel, shipment: Shipment) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        engine.gate.shut()
        info = await served.info()
        assert (info.role, info.state, info.model.name) == ("decode", "ready", "tiny")
        assert info.model.compatibility == loaded.identity.compatibility
        stream = served.stream()
        await stream.attach(1, await deliver(served, shipment, "first"))
        await engine.gate.reached()
        await stream.attach(2, await deliver(served, shipment, "second"))
        promise = await served.reserve(request_id="third")
        await until(lambda: served.worker.servicer._scheduler.waiting == 1)
        info = await served.info()
        assert (info.requests_running, info.requests_waiting) == (1, 1)
        assert (info.kv.reserved, info.kv.filling) == (promise.reserved_bytes, 0)
        assert info.kv.active > 0
        assert info.kv.capacity == 1 << 20
        engine.gate.open()

    run(model, body, max_num_seqs=1)


def test_a_drain_lets_answers_finish_and_refuses_new_ones(loaded: LoadedModel, shipment: Shipment) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        engine.gate.shut()
        stream = served.stream()
        await stream.attach(HANDLE, await deliver(served, shipment))
        await engine.gate.reached()
        drain = asyncio.create_task(served.worker.drain(15))
        await asyncio.sleep(0.02)
        assert (await served.info()).state == "draining"
        error = await failure(served.reserve(request_id="late"))
        assert (error.code, error.reason) == ("UNAVAILABLE", "DRAINING")
        assert not drain.done()
        engine.gate.open()
        await drain
        assert len(await stream.tokens(HANDLE)) == 7

    run(model, body)


def test_a_drain_tells_those_that_are_late(loaded: LoadedModel, shipment: Shipment) -> None:
    model, engine = scripted(loaded)

    async def body(served: Served) -> None:
        engine.gate.shut()
        stream = served.stream()
        await stream.attach(HANDLE, await deliver(served, shipment))
        await engine.gate.reached()
        drain = asyncio.create_task(served.worker.drain(0.02))
        (update,) = await stream.finished(HANDLE)
        assert (update.error.code, update.error.reason) == (grpc.StatusCode.UNAVAILABLE.value[0], "DRAINING")
        engine.gate.open()
        await drain
        await served.nothing_is_held()

    run(model, body)
