"""The text that follows a replay is what an uninterrupted stream says then, wherever it was cut."""

from __future__ import annotations

from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as public

from decode_worker.worker import LoadedModel
from shared.model.text_stream import TextStream
from shared.request.sampling import Sampling
from tests.unit.decode_worker.scripted import scripted
from tests.unit.decode_worker.serving import Served, frames, run
from tests.unit.decode_worker.shipment import Shipment
from tests.unit.decode_worker.test_generation import CIRCLE, EOS, LENGTH, RED, SMILE, SQUARE, STOP
from tests.unit.decode_worker.tiny import tokenizer


def said(answer: list[int], stop: tuple[str, ...], reason: public.FinishReason) -> list[str]:
    """The text that goes out with each token."""
    stream = TextStream(tokenizer(), stop)
    pieces = [stream.push(token) for token in answer]
    assert stream.stopped == (reason == STOP and answer[-1] != EOS)
    return [*pieces[:-1], pieces[-1] + stream.finish()]


@pytest.mark.parametrize(
    ("answer", "how", "reason"),
    [
        ([RED, CIRCLE, RED, SQUARE], {}, LENGTH),
        ([RED, *SMILE, CIRCLE, *SMILE], {}, LENGTH),
        ([*SMILE, *SMILE[:2]], {}, LENGTH),
        ([RED, CIRCLE, RED, SQUARE], {"stop": ("circle and", "red sq", "ar")}, STOP),
        ([RED, CIRCLE, RED, CIRCLE], {"stop": ("circle and", "circle red s")}, LENGTH),
        ([RED, CIRCLE, SQUARE], {"stop": ("le sq", "x")}, STOP),
        ([RED, CIRCLE, EOS], {"stop": ("circle and",), "ignore_eos": False}, STOP),
        ([RED, EOS, CIRCLE], {"ignore_eos": True}, LENGTH),
    ],
    ids=["words", "characters of many bytes", "an open end", "stop", "no stop", "stop across tokens", "end", "no end"],
)
def test_the_text_goes_on(
    loaded: LoadedModel, shipment: Shipment, answer: list[int], how: dict[str, Any], reason: public.FinishReason
) -> None:
    model, engine = scripted(loaded)
    pieces = said(answer, how.get("stop", ()), reason)
    sampling = Sampling(max_new_tokens=len(answer) + (reason == STOP), **how)
    engine.answers = {sampling.seed: answer[1:]}

    async def body(served: Served) -> None:
        stream = served.stream()
        for cut in range(1, len(answer)):
            promise = await served.reserve(request_id=str(cut), max_new_tokens=len(answer) + 1, delivered_tokens=cut)
            manifest = shipment.manifest(str(cut), generated=(answer[0],), sampling=sampling)
            await served.put(frames(promise.token, manifest, shipment.body))
            await stream.attach(cut, promise.token, answer[:cut])
            updates = await stream.finished(cut)
            assert [list(update.token_ids) for update in updates] == [[token] for token in answer[cut:]]
            assert [update.text for update in updates] == pieces[cut:]
            assert [update.finish_reason for update in updates] == [0] * (len(updates) - 1) + [reason]
        assert engine.replays == [*range(1, len(answer) - 1)]
        await served.nothing_is_held()

    run(model, body)


def test_an_end_in_the_middle_of_what_was_delivered_is_none(loaded: LoadedModel, shipment: Shipment) -> None:
    """Its reader went on reading; the next token shows how the answer ends."""
    model, engine = scripted(loaded)
    engine.answers[0] = [EOS, RED, CIRCLE, SQUARE, RED]

    async def body(served: Served) -> None:
        stream = served.stream()
        promise = await served.reserve(max_new_tokens=6)
        sampling = Sampling(max_new_tokens=6)
        await served.put(frames(promise.token, shipment.manifest(sampling=sampling), shipment.body))
        await stream.attach(1, promise.token, [shipment.prompt.first_token, EOS, RED])
        updates = await stream.finished(1)
        assert [token for update in updates for token in update.token_ids] == [CIRCLE, SQUARE, RED]
        assert updates[-1].finish_reason == LENGTH

    run(model, body)


def test_text_that_fails_in_a_replay_ends_its_sequence_alone(
    loaded: LoadedModel, shipment: Shipment, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = scripted(loaded)

    async def body(served: Served) -> None:
        stream = served.stream()
        for handle in (1, 2):
            promise = await served.reserve(request_id=str(handle))
            await served.put(frames(promise.token, shipment.manifest(str(handle)), shipment.body))
            if handle == 1:
                served.held.find(promise.token).answers[0].text._decode = lambda tokens: 1 // 0  # type: ignore[union-attr]
            await stream.attach(handle, promise.token, [shipment.prompt.first_token, RED, CIRCLE])
        assert (await stream.finished(1))[-1].error.reason == "INTERNAL"
        assert len(await stream.tokens(2)) == 5
        await served.nothing_is_held()

    run(model, body)
    assert "ZeroDivisionError" in caplog.text
