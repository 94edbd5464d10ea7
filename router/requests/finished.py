"""Answers that were just completed, for clients that lost them on the way and ask again."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import xxhash
from vlcache.v1 import inference_pb2 as pb

from shared.errors import DuplicateRequestError

KEEP_S = 60.0
MAX_ANSWERS = 4096
MAX_BYTES = 64 << 20
# A longer one, with its kept tokens explained perhaps, is not worth the place of many others.
MAX_ANSWER_BYTES = 1 << 20


@dataclass(frozen=True)
class Key:
    """Which request: whose, the client's own id for it, and everything else that it said."""

    tenant: str
    request_id: str
    digest: bytes

    @classmethod
    def of(cls, message: pb.GenerateRequest, tenant: str) -> Key | None:
        """None for a request that leaves its id to us: nobody can ask for it again.

        The digest tells a repetition from a mistake. It protects nothing: who can send the message may read the answer.
        """
        if not message.request_id:
            return None
        return cls(tenant, message.request_id, xxhash.xxh3_128_digest(message.SerializeToString(deterministic=True)))

    @property
    def name(self) -> tuple[str, str]:
        """Tenant and id: what the answer is found by."""
        return self.tenant, self.request_id


@dataclass(frozen=True)
class _Answer:
    digest: bytes
    events: tuple[bytes, ...]
    nbytes: int
    until_s: float


class FinishedAnswers:
    """Owner of the events of the last answers, oldest first; bounded in age, number and bytes.

    Invariant (`check_integrity`): the byte count is that of the answers held, and within its bound.
    """

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()
        self._nbytes = 0

    def find(self, key: Key | None) -> AsyncGenerator[pb.GenerateResponse, None] | None:
        """The events of the answer to the same request; None when it has none yet.

        Raises:
            DuplicateRequestError: Another request had this id a moment ago.
        """
        self._forget_old()
        answer = self._answers.get(key.name) if key else None
        if key is None or answer is None:
            return None
        if answer.digest != key.digest:
            raise DuplicateRequestError(f"request {key.request_id} was another one a moment ago", reason="ID_REUSED")
        return _repeat(answer)

    async def record(
        self, key: Key | None, events: AsyncGenerator[pb.GenerateResponse, None]
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Passes `events` on and keeps those of a complete answer."""
        said: list[bytes] = []
        nbytes = 0
        async with contextlib.aclosing(events):
            async for event in events:
                if key is not None and nbytes <= MAX_ANSWER_BYTES:
                    said.append(event.SerializeToString())
                    nbytes += len(said[-1])
                    # before the client has it: it may ask again as soon as it does
                    if event.HasField("finished") and nbytes <= MAX_ANSWER_BYTES:
                        self._keep(key, tuple(said), nbytes)
                yield event

    def check_integrity(self) -> None:
        """Asserts the invariant."""
        assert self._nbytes == sum(answer.nbytes for answer in self._answers.values())
        assert self._nbytes <= MAX_BYTES
        assert len(self._answers) <= MAX_ANSWERS

    def _keep(self, key: Key, events: tuple[bytes, ...], nbytes: int) -> None:
        until_s = asyncio.get_running_loop().time() + KEEP_S
        self._answers[key.name] = _Answer(key.digest, events, nbytes, until_s)
        self._nbytes += nbytes
        self._forget_old()

    def _forget_old(self) -> None:
        now_s = asyncio.get_running_loop().time()
        while self._answers:
            oldest = next(iter(self._answers.values()))
            crowded = len(self._answers) > MAX_ANSWERS or self._nbytes > MAX_BYTES
            if oldest.until_s > now_s and not crowded:
                return
            self._nbytes -= self._answers.popitem(last=False)[1].nbytes


async def _repeat(answer: _Answer) -> AsyncGenerator[pb.GenerateResponse, None]:
    for event in answer.events:
        yield pb.GenerateResponse.FromString(event)
