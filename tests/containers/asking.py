"""`python -m tests.containers.asking ADDRESS`: what a client sees that lives in the containers' network.

Streams questions about images twice: first in peace, then with a line on stdout as soon as all are under way, so that
somebody can do harm. Prints what the second round saw, if it is what the first one saw.
"""

from __future__ import annotations

import asyncio
import json
import sys

import vlcache

from tests.chaos.crowd import Answer, Crowd, ask, check_same, greedy_and_seeded

STREAMS = 4
UNDER_WAY = "under way"


async def main(address: str) -> None:
    questions = greedy_and_seeded(STREAMS)
    undisturbed = await ask(address, questions)
    async with Crowd(address, questions) as crowd:
        await crowd.reached(vlcache.Delta, 20)
        print(UNDER_WAY, flush=True)
        answers = await crowd.answers()
    check_same(answers, undisturbed)
    print(json.dumps([seen(answer) for answer in answers]))


def seen(answer: Answer) -> dict[str, object]:
    transports = [event.transport for event in answer.events if isinstance(event, vlcache.Transferred)]
    return {"tokens": len(answer.token_ids), "transports": transports, "decode": answer.placement.decode_worker}


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
