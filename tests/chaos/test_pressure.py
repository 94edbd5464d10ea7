"""protocol: "decode pool full", and clients that do not read, while a worker dies."""

from __future__ import annotations

import asyncio

import pytest
import vlcache

from models.shapes_vlm.questions import draw_samples
from tests.chaos.crowd import TIMEOUT, Answer, Crowd, Question, ask, check_same
from tests.chaos.failovers import failovers
from tests.integration.running_stack import RunningStack

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

REJECTED = "vlcache_reservation_rejected_total{"
# Of 256 MiB such an answer is promised 31, and most end after a few tokens.
GREEDY_FOR_MEMORY = vlcache.Sampling(max_new_tokens=4000)
MORE_THAN_FIT = 24
PAUSE_S = 2.0


def rejected(stack: RunningStack) -> float:
    lines = [line for line in stack.metrics("router").splitlines() if line.startswith(REJECTED)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_decode_pool_full_while_one_of_two_dies(stack: RunningStack) -> None:
    """The others wait for memory, of which there is half as much all at once."""
    samples = draw_samples(seed=990_032, count=MORE_THAN_FIT)
    questions = [Question(sample, GREEDY_FOR_MEMORY) for sample in samples]

    async def main() -> None:
        undisturbed = await ask(stack.address, questions)
        async with Crowd(stack.address, questions) as crowd:
            await crowd.someone(lambda stream: bool(stream.count(vlcache.Finished)))
            stack.kill("decode-0")
            check_same(await crowd.answers(), undisturbed)

    before = rejected(stack)
    asyncio.run(main())
    assert rejected(stack) > before


def test_overloaded_workers_are_no_lost_ones(stack: RunningStack) -> None:
    """protocol: "worker overloaded": load is a signal of its own, polls are answered, and nobody is given up."""
    samples = draw_samples(seed=990_033, count=2 * MORE_THAN_FIT)
    questions = [Question(sample, vlcache.Sampling(max_new_tokens=60, ignore_eos=True)) for sample in samples]

    async def main() -> tuple[set[str], int]:
        async with vlcache.AsyncClient(stack.address) as client, Crowd(stack.address, questions) as crowd:
            answering, states, waiting = asyncio.create_task(crowd.answers()), set(), 0
            while not answering.done():
                workers = (await client.info()).workers
                states |= {worker.state for worker in workers}
                waiting = max(waiting, sum(worker.requests_waiting for worker in workers))
                await asyncio.sleep(0.05)
            await answering
        return states, waiting

    before = [failovers(stack, kind) for kind in ("resend", "reprefill")]
    states, waiting = asyncio.run(main())
    assert states == {"ready"}
    assert waiting > 0, "nobody was overloaded"
    assert [failovers(stack, kind) for kind in ("resend", "reprefill")] == before


def test_a_slow_reader_misses_nothing_when_its_worker_dies(
    stack: RunningStack, questions: list[Question], undisturbed: list[Answer]
) -> None:
    slow, others = questions[0], questions[1:]

    async def read(answer: Answer, begun: asyncio.Event) -> None:
        async with (
            vlcache.AsyncClient(stack.address, timeout=TIMEOUT) as client,
            client.stream(slow.sample.question, images=slow.sample.images, sampling=slow.sampling) as stream,
        ):
            async for event in stream:
                answer.events.append(event)
                if isinstance(event, vlcache.Delta) and not begun.is_set():
                    begun.set()
                    await asyncio.sleep(PAUSE_S)
            answer.completion = await stream.result()

    async def main() -> None:
        answer, begun = Answer(), asyncio.Event()
        async with Crowd(stack.address, others) as crowd:
            reading = asyncio.create_task(read(answer, begun))
            await begun.wait()
            await crowd.reached(vlcache.Delta, 5)
            stack.kill("decode-1")
            check_same(await crowd.answers(), undisturbed[1:])
            await reading
        check_same([answer], undisturbed[:1])

    asyncio.run(main())
