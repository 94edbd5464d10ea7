"""A client that lost its answer on the way gets the same one again, and nobody computes anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as pb

from router.requests import finished
from router.requests.finished import FinishedAnswers, Key
from shared import errors
from tests.unit.router.fakes import ask, bench, kinds, run
from tests.unit.router.test_failures import error_of


class Clock:
    """Moves the running loop's clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        loop = asyncio.get_running_loop()
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + self.ahead_s)


async def said(*events: pb.GenerateResponse) -> AsyncGenerator[pb.GenerateResponse, None]:
    for event in events:
        yield event


def delta(text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text))


END = pb.GenerateResponse(finished=pb.Finished(seed=3))


async def keep(answers: FinishedAnswers, key: Key | None, *events: pb.GenerateResponse) -> None:
    assert [event async for event in answers.record(key, said(*events))] == list(events)
    answers.check_integrity()


def key_of(request_id: str, text: str = "?", tenant: str = "team-a") -> Key | None:
    return Key.of(ask(text, request_id=request_id), tenant)


def test_the_same_request_gets_the_same_events_and_no_worker_hears_of_it() -> None:
    async def main() -> None:
        async with bench() as b:
            first = await b.answer(request_id="mine", images=1)
            # a seed was drawn for the first one: the repetition has that, too
            assert await b.answer(request_id="mine", images=1) == first
            assert len(b.prefill[0].requests) == len(b.decode[0].reserves) == 1
            assert b.metric("requests_total", outcome="repeated", code="OK") == 1
            assert b.metric("requests_total", outcome="finished", code="OK") == 1
            assert b.metric("prompt_tokens_total") == 50

    run(main)


@pytest.mark.parametrize("change", [{"text": "another?"}, {"images": 2}, {"sampling": pb.SamplingParams(seed=1)}])
def test_another_request_under_the_same_id_is_refused(change: dict[str, Any]) -> None:
    async def main() -> None:
        async with bench() as b:
            first = {"request_id": "mine", "text": "this?", "images": 1}
            await b.answer(**first)
            error = await error_of(b, **(first | change))
            assert (error.code, error.reason) == ("ALREADY_EXISTS", "ID_REUSED")
            assert b.metric("requests_total", outcome="refused", code="ALREADY_EXISTS") == 1
            assert len(b.prefill[0].requests) == 1

    run(main)


def test_requests_without_an_id_are_never_the_same() -> None:
    async def main() -> None:
        async with bench() as b:
            first, second = await b.answer(), await b.answer()
            assert first[0].started.request_id != second[0].started.request_id
            assert len(b.prefill[0].requests) == 2

    run(main)


def test_what_failed_is_tried_again() -> None:
    async def main() -> None:
        async with bench() as b:
            usual = b.prefill[0].script
            b.prefill[0].script = lambda _: [errors.InternalError("broken")]
            assert (await error_of(b, request_id="mine")).code == "INTERNAL"
            b.prefill[0].script = usual
            assert kinds(await b.answer(request_id="mine"))[-1] == "finished"

    run(main)


def test_an_answer_that_its_client_did_not_read_to_the_end_is_kept_once_it_was_complete() -> None:
    async def main() -> None:
        answers = FinishedAnswers()
        events = answers.record(key_of("r"), said(delta("a"), END))
        assert await anext(events) == delta("a")
        assert answers.find(key_of("r")) is None
        assert await anext(events) == END
        # the last event may still be lost on its way
        repeated = answers.find(key_of("r"))
        assert repeated is not None
        assert [event async for event in repeated] == [delta("a"), END]
        await events.aclose()

    run(main)


def test_an_answer_is_forgotten_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        clock, answers = Clock(monkeypatch), FinishedAnswers()
        await keep(answers, key_of("r"), delta("a"), END)
        clock.ahead_s = finished.KEEP_S - 1
        assert answers.find(key_of("r")) is not None
        clock.ahead_s = finished.KEEP_S + 1
        assert answers.find(key_of("r", "something else")) is None
        answers.check_integrity()

    run(main)


def test_a_very_long_answer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "MAX_ANSWER_BYTES", 100)

    async def main() -> None:
        answers = FinishedAnswers()
        await keep(answers, key_of("long"), delta("a" * 60), delta("b" * 60), END)
        await keep(answers, key_of("short"), delta("a" * 60), END)
        assert answers.find(key_of("long")) is None
        assert answers.find(key_of("short")) is not None

    run(main)


@given(sizes=st.lists(st.integers(0, 90), max_size=30))
def test_the_oldest_make_room(sizes: list[int]) -> None:
    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finished, "MAX_ANSWERS", 5)
            patch.setattr(finished, "MAX_BYTES", 200)
            answers = FinishedAnswers()
            nbytes = []
            for number, size in enumerate(sizes):
                events = (delta("x" * size), END)
                nbytes.append(sum(event.ByteSize() for event in events))
                await keep(answers, key_of(str(number)), *events)
            held = [number for number in range(len(sizes)) if answers.find(key_of(str(number)))]
            # as many of the youngest as both bounds allow
            expected: list[int] = []
            for number in reversed(range(len(sizes))):
                if len(expected) == 5 or sum(nbytes[each] for each in (number, *expected)) > 200:
                    break
                expected.insert(0, number)
            assert held == expected

    run(main)
