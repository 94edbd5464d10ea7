"""Tokens that a slow client has not read come out together; nothing else changes its place."""

from __future__ import annotations

import asyncio
from itertools import takewhile
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2

from router.requests.inbox import MAX_RUN_TOKENS, Inbox, PrefillEnded
from tests.unit.router.fakes import TIMEOUT_S, bench, rest, run

A, B = object(), object()


def update(*token_ids: int, text: str = "", reason: int = 0) -> decode_pb2.SequenceUpdate:
    return decode_pb2.SequenceUpdate(token_ids=token_ids, text=text, finish_reason=reason)


async def taken(inbox: Inbox, count: int) -> list[tuple[object, Any]]:
    return [await asyncio.wait_for(inbox.get(), TIMEOUT_S) for _ in range(count)]


def test_what_is_read_at_once_stays_as_it_is() -> None:
    async def main() -> None:
        inbox, said = Inbox(), update(1, text="a")
        for _ in range(3):
            inbox.put_nowait((A, said))
            assert (await inbox.get())[1] is said

    run(main)


def test_a_reader_that_waits_is_woken() -> None:
    async def main() -> None:
        inbox = Inbox()
        reading = asyncio.create_task(taken(inbox, 1))
        await asyncio.sleep(0)
        assert not reading.done()
        inbox.put_nowait((A, PrefillEnded()))
        assert await reading == [(A, PrefillEnded())]

    run(main)


def test_tokens_in_line_come_together_up_to_the_last() -> None:
    async def main() -> None:
        inbox = Inbox()
        said = [
            update(1, text="a"),
            update(text="b"),
            update(2, 3, text="c"),
            update(4, reason=pb.FINISH_REASON_LENGTH),
        ]
        for each in said:
            inbox.put_nowait((A, each))
        assert await taken(inbox, 1) == [(A, update(1, 2, 3, 4, text="abc", reason=pb.FINISH_REASON_LENGTH))]
        # what came first belongs to the message of its step
        assert said[0] == update(1, text="a")

    run(main)


def test_reports_of_tokens_stay_with_them() -> None:
    async def main() -> None:
        inbox = Inbox()
        for token in range(3):
            report = pb.TokenLogprobs(token=pb.TokenLogprob(token_id=token, logprob=-token))
            inbox.put_nowait((A, decode_pb2.SequenceUpdate(token_ids=[token], logprobs=[report])))
        ((_, joined),) = await taken(inbox, 1)
        assert [report.token.token_id for report in joined.logprobs] == list(joined.token_ids) == [0, 1, 2]

    run(main)


def test_what_comes_at_once_is_bounded() -> None:
    async def main() -> None:
        inbox, count = Inbox(), 3 * MAX_RUN_TOKENS + 5
        for number in range(count):
            inbox.put_nowait((A, update(number)))
        sizes = [len(said.token_ids) for _, said in await taken(inbox, 4)]
        assert sizes == [MAX_RUN_TOKENS] * 3 + [5]

    run(main)


@given(st.lists(st.tuples(st.sampled_from((A, B)), st.one_of(st.integers(0, 9), st.just(None)))))
def test_tokens_of_one_source_are_joined_where_only_tokens_stand_between_them(
    said: list[tuple[object, int | None]],
) -> None:
    """A number is a token, None something else."""

    async def main() -> None:
        inbox = Inbox()
        expected: list[tuple[object, list[int] | None]] = []
        for source, number in said:
            inbox.put_nowait((source, PrefillEnded() if number is None else update(number, text=str(number))))
            latest = [*takewhile(lambda item: item[1] is not None, reversed(expected))]
            run = next((tokens for other, tokens in latest if other is source), None)
            if number is not None and run is not None:
                run.append(number)
            else:
                expected.append((source, None if number is None else [number]))
        got = [
            (source, None if isinstance(item, PrefillEnded) else list(item.token_ids))
            for source, item in await taken(inbox, len(expected))
        ]
        assert got == expected

    asyncio.run(main())


def test_a_client_that_reads_slowly_gets_every_token_in_fewer_events() -> None:
    """What the sockets do not take any more waits in the router, and is not lost."""

    async def main() -> None:
        async with bench() as b:
            told = asyncio.Event()
            count, word = 3000, "x" * 3000

            async def script(stream: Any, handle: int, token: bytes) -> None:
                for number in range(count):
                    reason = pb.FINISH_REASON_LENGTH if number == count - 1 else 0
                    stream.send(
                        decode_pb2.SequenceUpdate(handle=handle, token_ids=[number], text=word, finish_reason=reason)
                    )
                told.set()

            b.decode[0].script = script
            call = b.ask()
            events = [await call.read(), await call.read()]
            await asyncio.wait_for(told.wait(), TIMEOUT_S)
            # the whole answer is on its way: the request has ended for its decode worker
            await b.becomes(lambda: not b.worker("decode-0").tokens.attached)
            events += await rest(call)
            ids = [token for event in events for token in event.delta.token_ids]
            assert ids == [1, *range(count)]
            assert sum(len(event.delta.text) for event in events) == 1 + count * len(word)
            assert len(events) < count * 0.9
            assert events[-1].finished.usage.generated_tokens == count + 1

    run(main)
