"""Workers that neither answer nor die."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.unit.router.fakes import (
    bench,
    compression,
    first_to_log,
    first_token,
    forever,
    go_on,
    hang,
    prompt_done,
    retained,
    run,
)
from tests.unit.router.test_failover import check_counted_once, check_whole, failovers, once, pairs
from tests.unit.router.test_failures import error_of


@pytest.mark.parametrize("start", [[], [first_token()]])
def test_a_prompt_that_takes_too_long_goes_to_another_worker(start: list[Any]) -> None:
    async def main() -> None:
        prefill, decode = pairs()

        def hangs_once(request: Any) -> list[Any]:
            return [*start, forever()] if request.attempt == 1 else prompt_done()

        for worker in prefill:
            worker.script = hangs_once
        async with bench(prefill, decode, prefill_timeout_s=0.3) as b:
            check_whole(await b.answer())
            await b.idle()
            check_counted_once(b)
            assert failovers(b, "reprefill", "PREFILL_TIMEOUT") == 1
            assert sum(len(worker.cancelled) for worker in prefill) == 1

    run(main)


@pytest.mark.parametrize("start", [[], [first_token()]])
def test_a_prefill_worker_that_fails_its_polls_is_not_waited_for_that_long(start: list[Any]) -> None:
    async def main() -> None:
        prefill, decode = pairs()

        def hangs_once(request: Any) -> list[Any]:
            return [*start, forever()] if request.attempt == 1 else prompt_done()

        for worker in prefill:
            worker.script = hangs_once
        async with bench(prefill, decode, token_timeout_s=0.3, poll_timeout_s=0.1) as b:
            asked = asyncio.create_task(b.answer())
            await first_to_log([worker.requests for worker in prefill])
            (hung,) = (worker for worker in prefill if worker.requests)
            hung.answers_polls = False
            check_whole(await asked)
            assert failovers(b, "reprefill", "PREFILL_TIMEOUT") == 1
            hung.answers_polls = True
            await b.becomes(lambda: b.worker(hung.info.name).state == "ready")

    run(main)


def test_a_prompt_waits_for_as_long_as_its_worker_computes_others() -> None:
    async def main() -> None:
        prefill_timeout_s = 1.0
        async with bench(*pairs(1, 1), prefill_timeout_s=prefill_timeout_s, token_timeout_s=0.2, max_failovers=0) as b:
            worker, gets_on = b.prefill[0], asyncio.Event()
            worker.script = lambda _: [gets_on.wait(), *prompt_done()]
            asked = asyncio.create_task(b.answer())
            await worker.requests.reaches(1)
            give_up = time.monotonic() + 3 * prefill_timeout_s
            while time.monotonic() < give_up:
                worker.info.passes_ended += 1
                await asyncio.sleep(prefill_timeout_s / 10)
            gets_on.set()
            check_whole(await asked)

    run(main)


def test_a_prefill_worker_that_answers_its_polls_is_waited_for() -> None:
    async def main() -> None:
        async with bench(token_timeout_s=0.2) as b:
            goes_on = asyncio.Event()
            b.prefill[0].script = lambda _: [goes_on.wait(), *prompt_done()]
            asked = asyncio.create_task(b.answer())
            await b.prefill[0].requests.reaches(1)
            await b.prefill[0].polls.reaches(len(b.prefill[0].polls) + 10)
            goes_on.set()
            await asked
            assert len(b.prefill[0].requests) == 1

    run(main)


@pytest.mark.parametrize("at_fault", ["prefill", "decode"])
def test_a_transfer_that_takes_too_long_is_the_fault_of_whom_the_polls_say(at_fault: str) -> None:
    async def main() -> None:
        prefill, decode = pairs()
        script = once(hang, go_on())
        for worker in decode:
            worker.script = script

        def hangs_once(request: Any) -> list[Any]:
            if request.attempt > 1:
                return prompt_done()
            return [first_token(), compression(), retained(), forever()]

        for worker in prefill:
            worker.script = hangs_once
        async with bench(prefill, decode, transfer_timeout_s=0.5, poll_timeout_s=0.1) as b:
            asked = asyncio.create_task(b.answer())
            await first_to_log([worker.delivered for worker in decode])
            if at_fault == "prefill":
                (holder,) = (worker for worker in prefill if worker.requests)
                holder.answers_polls = False
            check_whole(await asked)
            for worker in prefill:
                worker.answers_polls = True
            await b.idle()
            way = "reprefill" if at_fault == "prefill" else "resend"
            assert failovers(b, way, "TRANSFER_TIMEOUT") == 1

    run(main)


def test_a_decode_worker_that_says_nothing_and_fails_its_polls_is_given_up() -> None:
    async def main() -> None:
        prefill, decode = pairs(prefill=1)
        script = once(go_on(until=4, then=lambda *_: forever()), go_on())
        for worker in decode:
            worker.script = script
        async with bench(prefill, decode, token_timeout_s=0.4, poll_timeout_s=0.1) as b:
            asked = asyncio.create_task(b.answer())
            await first_to_log([worker.delivered for worker in decode])
            (hung,) = (worker for worker in decode if worker.delivered)
            hung.answers_polls = False
            check_whole(await asked)
            assert failovers(b, "resend", "DECODE_WORKER_LOST") == 1
            hung.answers_polls = True
            await b.becomes(lambda: b.worker(hung.info.name).state == "ready")

    run(main)


def test_one_that_is_silent_but_answers_its_polls_is_waited_for() -> None:
    """Its sequences may be parked while it serves other routers."""

    async def main() -> None:
        prefill, decode = pairs(1, 1)
        goes_on = asyncio.Event()

        async def parked(stream: Any, handle: int, token: bytes) -> None:
            await goes_on.wait()
            await go_on()(stream, handle, token)

        decode[0].script = parked
        async with bench(prefill, decode, token_timeout_s=0.2) as b:
            asked = asyncio.create_task(b.answer())
            await decode[0].attached.reaches(1)
            await decode[0].polls.reaches(len(decode[0].polls) + 10)
            goes_on.set()
            check_whole(await asked)
            assert decode[0].delivered == [[1]]

    run(main)


def test_one_that_fails_its_polls_but_says_tokens_is_listened_to() -> None:
    async def main() -> None:
        prefill, decode = pairs(1, 1)

        async def slowly(stream: Any, handle: int, token: bytes) -> None:
            decode[0].answers_polls = False
            for count in range(2, 9):
                await asyncio.sleep(0.15)
                await go_on(until=count)(stream, handle, token)
                stream.delivered[handle] = list(range(1, count + 1))

        decode[0].script = slowly
        async with bench(prefill, decode, token_timeout_s=0.4, poll_timeout_s=0.05) as b:
            check_whole(await b.answer())
            assert b.worker("decode-0").state == "unreachable"
            decode[0].answers_polls = True

    run(main)


def test_a_worker_that_hangs_in_a_resend_costs_its_transfer_time_only() -> None:
    async def main() -> None:
        prefill, decode = pairs(decode=3)
        cut = go_on(until=4, then=lambda stream, _: _end(stream))
        script = once(cut, go_on())
        for worker in decode:
            worker.script = script
        stuck = iter([forever])
        for worker in prefill:
            worker.on_resend = lambda _: next(stuck, lambda: None)()
        async with bench(prefill, decode, transfer_timeout_s=0.3) as b:
            check_whole(await b.answer())
            assert failovers(b, "resend", "DECODE_WORKER_LOST") == 1
            assert failovers(b, "resend", "WORKER_TIMEOUT") == 1

    run(main)


async def _end(stream: Any) -> None:
    stream.end()


def test_nobody_left_names_the_stage_that_took_too_long() -> None:
    async def main() -> None:
        async with bench(prefill_timeout_s=0.2, max_failovers=0) as b:
            b.prefill[0].script = lambda _: [forever()]
            error = await error_of(b)
            assert (error.code, error.reason) == ("UNAVAILABLE", "PREFILL_TIMEOUT")
            assert (error.stage, error.worker) == ("prefill", "prefill-0")

    run(main)
