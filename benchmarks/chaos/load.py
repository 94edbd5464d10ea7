"""Requests whose answers are known, and what came of them."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import vlcache
from tqdm import tqdm

from benchmarks.chaos.config import ChaosConfig
from models.shapes_vlm.questions import Sample, draw_samples

DEADLINE_S = 120.0


@dataclass(frozen=True)
class Question:
    """One request; what is drawn at random is drawn from its seed."""

    sample: Sample
    sampling: vlcache.Sampling


@dataclass(frozen=True)
class Stream:
    """What a client has received."""

    token_ids: tuple[int, ...]
    text: str
    arrivals_s: tuple[float, ...] = ()
    """When tokens came, by the loop's clock."""
    failure: str = ""
    """Code and text of the error that ended it; empty when it was completed."""

    def same_as(self, twin: Stream) -> bool:
        """Whether both say the same."""
        return (self.token_ids, self.text) == (twin.token_ids, twin.text)


def draw_questions(config: ChaosConfig) -> list[Question]:
    """Greedy and seeded in turn."""
    greedy = vlcache.Sampling(max_new_tokens=config.max_new_tokens, ignore_eos=True)
    samplings = (greedy, dataclasses.replace(greedy, temperature=config.temperature, seed=config.seed))
    samples = draw_samples(seed=config.seed, count=config.questions)
    return [Question(sample, samplings[number % 2]) for number, sample in enumerate(samples)]


async def ask_all(
    client: vlcache.AsyncClient, questions: Sequence[Question], *, clients: int, label: str
) -> list[Stream]:
    """All streams, in the order of the questions; so many at the same time."""
    places = asyncio.Semaphore(clients)
    with tqdm(total=len(questions), unit="request", file=sys.stderr, desc=label) as bar:

        async def ask(question: Question) -> Stream:
            async with places:
                stream = await _read(client, question)
            bar.update()
            return stream

        return await asyncio.gather(*(ask(question) for question in questions))


async def _read(client: vlcache.AsyncClient, question: Question) -> Stream:
    """Reads what comes as it comes: what a client has seen counts, not what the end says of it."""
    clock, sample = asyncio.get_running_loop().time, question.sample
    token_ids: list[int] = []
    arrivals_s: list[float] = []
    texts: list[str] = []
    failure = ""
    try:
        async with client.stream(sample.question, images=sample.images, sampling=question.sampling) as stream:
            async for event in stream:
                if isinstance(event, vlcache.Delta):
                    token_ids += event.token_ids
                    texts.append(event.text)
                    arrivals_s += [clock()] * len(event.token_ids)
    except vlcache.VlcacheError as error:
        failure = f"{error.code.name}: {error}"
    return Stream(tuple(token_ids), "".join(texts), tuple(arrivals_s), failure)
