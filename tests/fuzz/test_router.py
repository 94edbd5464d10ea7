"""A whole router whose clients ask for anything and leave when they like: it gives reasons, and holds nothing."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from vlcache.v1 import inference_pb2 as pb

from tests.fuzz import seeds
from tests.fuzz.mutation import TEXTS, strange
from tests.fuzz.refusals import taken
from tests.fuzz.running import fuzz_served
from tests.unit.router.fakes import Bench, bench

# After so many cases everything must have been cleaned up.
PAUSE = 50
ANSWER = "ABC"


async def read(bench: Bench, request: pb.GenerateRequest, tenant: str | None) -> str:
    """The text of the first answer: the prefill worker here says nothing of others."""
    metadata = () if tenant is None else (("vlcache-tenant", tenant),)
    call = bench.stub.Generate(request, metadata=metadata)
    return "".join([event.delta.text async for event in call if event.delta.choice == 0])


@pytest.mark.fuzz
def test_requests() -> None:
    seen = Counter[str]()

    async def main() -> None:
        async with bench() as b:
            asked = 0

            async def case(chance: random.Random) -> None:
                nonlocal asked
                request = chance.choice(seeds.requests())
                request.request_id = chance.choice(("", "r-1", "r-2", str(chance.random())))
                if chance.random() < 0.7:
                    strange(chance, request)
                tenant = chance.choice((None, "a", *(text for text in TEXTS if text.isascii() and text.isprintable())))
                reading = asyncio.create_task(read(b, request, tenant))
                if chance.random() < 0.2:
                    await asyncio.sleep(0.005 * chance.random())
                    reading.cancel()
                    await asyncio.wait([reading])
                    seen["left"] += 1
                else:
                    assert await taken(reading, seen) in (None, ANSWER)
                asked += 1
                if asked % PAUSE == 0:
                    await b.idle()

            await fuzz_served(case)

    asyncio.run(main())
    # or the cases would say little
    assert {"OK", "left", "INVALID_ARGUMENT", "NOT_FOUND"} <= seen.keys(), seen
