"""A load on a running service: requests that arrive at random, and what became of each."""

import asyncio
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlcache._async_client import AsyncClient
from vlcache._completion import Completion
from vlcache._errors import VlcacheError
from vlcache._progress import Advance
from vlcache._request import Request


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When requests come.

    rate: requests per second; infinite when all come at once.
    burstiness: 1 is a Poisson process; less is burstier, more is more regular.
    seed: of the gaps.

    Raises ValueError when a value is not positive.
    """

    rate: float
    burstiness: float
    seed: int

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.burstiness > 0):
            raise ValueError("--request-rate and --burstiness must be greater than 0")

    def times_s(self) -> Iterator[float]:
        """Seconds from the start, one for each request."""
        dice, at_s = random.Random(self.seed), 0.0  # noqa: S311 - nothing secret depends on it
        while True:
            yield at_s
            if not math.isinf(self.rate):
                at_s += dice.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request: its answer or its error, and when it was sent and had ended, in seconds from the start."""

    sent_s: float
    ended_s: float
    answer: Completion | VlcacheError


@dataclass(frozen=True, kw_only=True)
class Run:
    """All outcomes in the order of the requests, and how long it took from the first request to the last end."""

    outcomes: Sequence[Outcome]
    duration_s: float


async def run_load(
    client: AsyncClient,
    requests: Sequence[Request],
    arrivals: Arrivals,
    *,
    max_concurrency: int | None,
    advance: Advance,
) -> Run:
    """Sends every request at its time, or when less than `max_concurrency` are in flight, whatever is later."""
    slots = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    start = time.monotonic()

    async def one(request: Request) -> Outcome:
        async with slots:
            sent_s = time.monotonic() - start
            answer = await _answer(client, request)
        advance()
        return Outcome(sent_s=sent_s, ended_s=time.monotonic() - start, answer=answer)

    tasks = []
    try:
        for request, at_s in zip(requests, arrivals.times_s(), strict=False):
            await asyncio.sleep(max(0.0, start + at_s - time.monotonic()))
            tasks.append(asyncio.create_task(one(request)))
        outcomes = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Run(outcomes=outcomes, duration_s=time.monotonic() - start)


async def _answer(client: AsyncClient, request: Request) -> Completion | VlcacheError:
    try:
        async with client.stream(**request.options()) as stream:
            return await stream.result()
    except VlcacheError as error:
        return error
