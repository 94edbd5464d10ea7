"""Several answers of one request: each is delivered, lost and taken up by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from tests.unit.router.fakes import (
    Bench,
    FakeDecode,
    FakePrefill,
    Stream,
    bench,
    compression,
    kinds,
    next_token,
    retained,
    run,
    transfer,
)
from tests.unit.router.test_delivery import delivery

LENGTH, STOP = pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP
# the last answer ends with its first token
ANSWERS = {0: [10, 11, 12, 13, 14], 1: [20, 21, 22], 2: [30]}
THREE = pb.SamplingParams(n=3, seed=7)


def reason_of(choice: int, number: int) -> pb.FinishReason:
    return STOP if number == len(ANSWERS[choice]) else pb.FINISH_REASON_UNSPECIFIED


def prompt(_: Any = None) -> list[Any]:
    """All first tokens, and one that was decoded ahead."""
    first = [
        prefill_pb2.PrefillEvent(
            first_token=prefill_pb2.FirstToken(
                token_id=tokens[0],
                text=chr(tokens[0]),
                prompt_tokens=50,
                visual_tokens=40,
                choice=choice,
                finish_reason=reason_of(choice, 1),
            )
        )
        for choice, tokens in ANSWERS.items()
    ]
    return [*first, next_token(chr(11), 11), compression(), retained(), transfer()]


def says(until: Mapping[int, int], then: Any = None) -> Any:
    """A decode script: what follows of each answer, up to so many of its tokens; then something, by choice."""

    async def script(stream: Stream, handle: int, token: bytes) -> None:
        choice = stream.choices[handle]
        for number in range(len(stream.delivered[handle]) + 1, until.get(choice, 9) + 1):
            if number <= len(ANSWERS[choice]):
                said = ANSWERS[choice][number - 1]
                update = decode_pb2.SequenceUpdate(handle=handle, token_ids=[said], text=chr(said))
                update.finish_reason = reason_of(choice, number)
                stream.send(update)
        if then is not None:
            await then(stream, handle, choice)

    return script


def pieces(events: Sequence[pb.GenerateResponse], choice: int) -> list[pb.Delta]:
    return [each.delta for each in events if each.HasField("delta") and each.delta.choice == choice]


def check_whole(b: Bench, events: Sequence[pb.GenerateResponse]) -> None:
    for choice, tokens in ANSWERS.items():
        mine = pieces(events, choice)
        assert [token for delta in mine for token in delta.token_ids] == tokens
        assert "".join(delta.text for delta in mine) == "".join(map(chr, tokens))
        assert [delta.finish_reason for delta in mine if delta.finish_reason] == [STOP] == [mine[-1].finish_reason]
    assert events[-1].finished.usage == pb.Usage(prompt_tokens=50, visual_tokens=40, generated_tokens=9)
    assert {kind: kinds(events).count(kind) for kind in ("started", "compression", "transfer", "finished")} == {
        "started": 1,
        "compression": 1,
        "transfer": 1,
        "finished": 1,
    }
    assert b.metric("generation_tokens_total") == 9
    # gaps between tokens of one answer, and no others
    assert b.metric("inter_token_latency_seconds_count") == 4 + 2
    assert b.metric("time_to_second_token_seconds_count") == 1
    assert b.metric("requests_total", outcome="finished", code="OK") == 1


def asked(**delivered: int) -> list[decode_pb2.ReservedAnswer]:
    return [
        decode_pb2.ReservedAnswer(choice=int(name[1:]), delivered_tokens=tokens) for name, tokens in delivered.items()
    ]


def test_each_answer_is_reserved_attached_and_delivered() -> None:
    async def main() -> None:
        async with bench() as b:
            b.prefill[0].script, b.decode[0].script = prompt, says({})
            events = await b.answer(sampling=THREE)
            await b.idle()
            check_whole(b, events)
            (reserve,) = b.decode[0].reserves
            assert list(reserve.answers) == asked(c0=0, c1=0, c2=0)
            assert not reserve.copies
            # the third one had ended before: its memory is given back
            assert b.decode[0].delivered == [[10, 11], [20], []]
            assert not b.decode[0].releases
            (cancelled,) = b.decode[0].cancels
            assert b.decode[0].streams[0].choices[cancelled] == 2

    run(main)


def test_a_policy_that_rewrites_gets_copies() -> None:
    async def main() -> None:
        prefill, decode = FakePrefill(), FakeDecode()
        for worker in (prefill, decode):
            worker.info.model.rewriting_policies.append("streaming")
        async with bench([prefill], [decode]) as b:
            b.prefill[0].script, b.decode[0].script = prompt, says({})
            for policy, copies in (("streaming", True), ("vl_cache", False)):
                await b.answer(sampling=THREE, compression=pb.CompressionParams(policy=policy))
                assert b.decode[0].reserves[-1].copies == copies

    run(main)


async def breaks(stream: Stream, handle: int, choice: int) -> None:
    # both have said what they say: the second is attached last
    if choice == 1:
        stream.end()


@pytest.mark.parametrize("cut", [2, 3, 4])
@pytest.mark.parametrize("way", ["resend", "reprefill"])
def test_those_that_are_not_complete_go_on_elsewhere(cut: int, way: str) -> None:
    """The second answer is complete when its worker is lost, or nothing of it has come."""

    async def main() -> None:
        for second in (1, 3):
            decode = [FakeDecode(f"decode-{number}") for number in range(2)]
            async with bench(None, decode) as b:
                b.prefill[0].script = prompt
                turns = iter([says({0: cut, 1: second}, breaks)] * 2)

                async def script(stream: Stream, handle: int, token: bytes) -> None:
                    if stream.choices[handle] == 0 and way == "reprefill" and len(b.prefill[0].requests) == 1:
                        b.prefill[0].parcels.clear()
                    await next(turns, says({}))(stream, handle, token)  # noqa: B023

                for worker in decode:
                    worker.script = script
                events = await b.answer(sampling=THREE)
                await b.idle()
                check_whole(b, events)
                again = max((each for worker in decode for each in worker.reserves), key=lambda each: each.attempt)
                told = {answer.choice: answer.delivered_tokens for answer in again.answers}
                assert told == {0: cut} | ({1: 1} if second == 1 else {})
                given = [tokens for worker in decode for tokens in worker.delivered][-len(told) :]
                assert sorted(given) == [ANSWERS[choice][:tokens] for choice, tokens in told.items()]
                if way == "resend":
                    assert b.metric("failovers_total", kind="resend", reason="DECODE_WORKER_LOST") == 1
                else:
                    known = [list(answer.tokens) for answer in b.prefill[0].requests[1].delivered]
                    assert known == [ANSWERS[0][:cut], ANSWERS[1][:second], [30]]

    run(main)


@given(st.data())
def test_every_token_of_each_arrives_once_however_runs_are_cut(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    answers = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=n, max_size=n))
    seen = delivery(n)
    got: dict[int, list[int]] = {choice: [] for choice in range(n)}
    for last in (False, False, True):
        seen.rewind()
        for choice, answer in enumerate(answers):
            event = prefill_pb2.FirstToken(token_id=answer[0], choice=choice)
            event.finish_reason = STOP if len(answer) == 1 else 0
            for response in seen.on_first_token(event):
                got[response.delta.choice].extend(response.delta.token_ids)
        for choice, tokens in dict(seen.open_answers).items():
            whole = answers[choice]
            until = len(whole) if last else data.draw(st.integers(len(tokens), len(whole)))
            for number in range(len(tokens), until):
                update = decode_pb2.SequenceUpdate(token_ids=[whole[number]])
                update.finish_reason = STOP if number + 1 == len(whole) else 0
                for response in seen.on_update(update, choice):
                    got[response.delta.choice].extend(response.delta.token_ids)
    assert list(got.values()) == answers
    assert seen.complete
    assert not seen.open_answers


@pytest.mark.parametrize("n", [17, 1 << 31])
def test_more_than_sixteen_are_refused(n: int) -> None:
    async def main() -> None:
        async with bench() as b:
            with pytest.raises(Exception, match=r"n must lie in \[1, 16\]"):
                await b.answer(sampling=pb.SamplingParams(n=n))
            assert not b.decode[0].reserves

    run(main)


def test_the_first_answer_alone_is_repeated_in_the_shadow() -> None:
    async def main() -> None:
        async with bench(shadow_share=1.0) as b:
            b.prefill[0].script = lambda request: (
                prompt() if request.request.sampling.n == 3 else [prompt()[0], compression(), transfer()]
            )
            b.decode[0].script = says({})
            await b.answer(sampling=THREE)
            await b.idle()
            again = b.prefill[0].requests[1].request
            assert (again.sampling.n, again.sampling.seed) == (1, 7)
            assert b.metric("shadow_agreement_ratio_sum") == 1.0

    run(main)
