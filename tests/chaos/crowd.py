"""Streams that run at the same time while processes die around them, and what they should have said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import vlcache

from models.shapes_vlm.questions import Sample, draw_samples

TOKENS = 500
# A blow has to hit somebody: streams that must still be running when it falls.
ENOUGH = 3
TIMEOUT = vlcache.Timeout(total_s=90)


@dataclass(frozen=True)
class Question:
    """One request. What is drawn at random is drawn from its seed."""

    sample: Sample
    sampling: vlcache.Sampling


def greedy_and_seeded(count: int, *, tokens: int = TOKENS) -> list[Question]:
    """`count` questions about images: greedy ones, with a temperature, minding what was said, and of a given form."""
    greedy = vlcache.Sampling(max_new_tokens=tokens, ignore_eos=True)
    seeded = vlcache.Sampling(max_new_tokens=tokens, ignore_eos=True, temperature=1.5, seed=77)
    minding = vlcache.Sampling(
        max_new_tokens=tokens, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.01, logprobs=2
    )
    formed = vlcache.Sampling(
        max_new_tokens=tokens, ignore_eos=True, temperature=1.5, seed=78, regex="([a-z]{2,5} [0-9]*\\.)*"
    )
    samples = draw_samples(seed=990_031, count=count)
    return [Question(sample, (greedy, seeded, minding, formed)[number % 4]) for number, sample in enumerate(samples)]


class Answer:
    """One stream as its client sees it."""

    def __init__(self) -> None:
        self.events: list[vlcache.Event] = []
        self.completion: vlcache.Completion | None = None

    @property
    def token_ids(self) -> list[int]:
        """Those that have arrived."""
        return [token for event in self.events if isinstance(event, vlcache.Delta) for token in event.token_ids]

    @property
    def placement(self) -> vlcache.Placement:
        assert self.completion is not None
        return self.completion.placement

    def count(self, kind: type) -> int:
        return sum(isinstance(event, kind) for event in self.events)


class Crowd:
    """Use as a context manager: all ask at once; leaving it early cancels who still runs."""

    def __init__(self, address: str, questions: Sequence[Question]) -> None:
        self._client = vlcache.AsyncClient(address, timeout=TIMEOUT)
        self._questions = questions
        self._something_arrived = asyncio.Condition()
        self.streams = [Answer() for _ in questions]

    async def __aenter__(self) -> Crowd:
        pairs = zip(self._questions, self.streams, strict=True)
        self._readers = [asyncio.create_task(self._read(question, answer)) for question, answer in pairs]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await self._client.close()

    async def reached(self, kind: type, count: int = 1) -> None:
        """Until every stream has seen so many events of a kind; enough of them are still running then."""
        async with self._something_arrived:
            await self._something_arrived.wait_for(
                lambda: all(stream.count(kind) >= count for stream in self.streams) or self._has_failed
            )
        running = sum(not reader.done() for reader in self._readers)
        assert running >= min(ENOUGH, len(self.streams)), "the streams ended before the blow"

    async def someone(self, met: Callable[[Answer], bool]) -> None:
        """Until it is true of some stream."""
        async with self._something_arrived:
            await self._something_arrived.wait_for(lambda: any(map(met, self.streams)) or self._has_failed)

    async def answers(self) -> list[Answer]:
        """All of them, when all have ended.

        Raises:
            VlcacheError: One has failed.
        """
        await asyncio.gather(*self._readers)
        return self.streams

    @property
    def _has_failed(self) -> bool:
        return any(reader.done() and reader.exception() is not None for reader in self._readers)

    async def _read(self, question: Question, answer: Answer) -> None:
        try:
            sample = question.sample
            async with self._client.stream(sample.question, images=sample.images, sampling=question.sampling) as stream:
                async for event in stream:
                    await self._note(answer, event)
                answer.completion = await stream.result()
        finally:
            async with self._something_arrived:
                self._something_arrived.notify_all()

    async def _note(self, answer: Answer, event: vlcache.Event) -> None:
        async with self._something_arrived:
            answer.events.append(event)
            self._something_arrived.notify_all()


async def ask(address: str, questions: Sequence[Question]) -> list[Answer]:
    """The answers to questions that are asked at the same time and left alone."""
    async with Crowd(address, questions) as crowd:
        return await crowd.answers()


def check_same(answers: Sequence[Answer], undisturbed: Sequence[Answer]) -> None:
    """No token is missing, doubled or another one, no report is told twice, and texts are what the tokens say."""
    for answer, twin in zip(answers, undisturbed, strict=True):
        assert answer.token_ids == twin.token_ids
        assert answer.completion is not None
        assert twin.completion is not None
        assert answer.completion.token_ids == twin.completion.token_ids
        assert answer.completion.text == twin.completion.text
        reported = [
            tuple(each.token.token_id for each in done.logprobs) for done in (answer.completion, twin.completion)
        ]
        assert reported[0] == reported[1]
        assert reported[0] in ((), answer.completion.token_ids)
        for kind in (vlcache.Started, vlcache.Compressed, vlcache.Transferred, vlcache.Finished):
            assert answer.count(kind) == 1, kind
