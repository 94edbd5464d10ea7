"""What reaches a request, from both workers and from its own timers, in one line."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from shared.errors import ServiceError
from shared.request.sampling import MAX_ANSWERS

# Tokens that are joined at most: what a client gets at once stays far below the size that its gRPC takes.
MAX_RUN_TOKENS = 1024


@dataclass(frozen=True)
class PrefillEnded:
    """The last thing that is heard of a prefill call; no error means that it did all it had to."""

    error: ServiceError | None = None


Said: TypeAlias = "prefill_pb2.PrefillEvent | PrefillEnded | decode_pb2.SequenceUpdate | ServiceError"

# Who says it, and what: what is still in line of a source that was given up is passed over.
Item: TypeAlias = "tuple[object, Said]"


class Inbox:
    """First in, first out, for one reader; but tokens of one source between which nothing but tokens stands are one.

    A client that reads slowly stops its request from reading this. It then gets what came meanwhile in few large
    events, and no update is held that would keep the message of its step, and so everybody's tokens, in memory.
    """

    def __init__(self) -> None:
        self._items: deque[Item | _Run] = deque()
        self._arrived = asyncio.Event()

    def put_nowait(self, item: Item) -> None:
        """Adds what `item`'s source says; never waits."""
        source, said = item
        if isinstance(said, decode_pb2.SequenceUpdate) and self._items:
            self._run_of(source).add(said)
        else:
            self._items.append(item)
        self._arrived.set()

    async def get(self) -> Item:
        """Waits for the next item and takes it out."""
        while not self._items:
            self._arrived.clear()
            await self._arrived.wait()
        item = self._items.popleft()
        return (item.source, item.update()) if isinstance(item, _Run) else item

    def _run_of(self, source: object) -> _Run:
        """The run near the end of the line, if it is of this source and not too long; else a new one."""
        last = self._items[-1]
        if not isinstance(last, _Run) and isinstance(last[1], decode_pb2.SequenceUpdate):
            joined = _Run(last[0])
            joined.add(last[1])
            self._items[-1] = joined
        # answers of one request come in turns, and know no order among each other
        for item in islice(reversed(self._items), MAX_ANSWERS):
            if not isinstance(item, _Run):
                break
            if item.source == source:
                if len(item.token_ids) < MAX_RUN_TOKENS:
                    return item
                break
        run = _Run(source)
        self._items.append(run)
        return run


@dataclass(eq=False)
class _Run:
    """Updates of one source without anything between them."""

    source: object
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    finish_reason: pb.FinishReason = pb.FINISH_REASON_UNSPECIFIED

    def add(self, update: decode_pb2.SequenceUpdate) -> None:
        self.token_ids.extend(update.token_ids)
        self.texts.append(update.text)
        self.logprobs.extend(update.logprobs)
        self.finish_reason = update.finish_reason

    def update(self) -> decode_pb2.SequenceUpdate:
        return decode_pb2.SequenceUpdate(
            token_ids=self.token_ids,
            text="".join(self.texts),
            finish_reason=self.finish_reason,
            logprobs=self.logprobs,
        )
