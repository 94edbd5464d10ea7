"""Tokens on their way to one router: everything that is ready goes out in one message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import decode_pb2 as pb

from shared.errors import ServiceError
from shared.rpc.status import code_number


class TokenOutbox:
    """One per `StreamTokens` call. A step of the whole batch becomes one message, not one per sequence."""

    def __init__(self) -> None:
        self._updates: list[pb.SequenceUpdate] = []
        self._draining = False
        self._ready = asyncio.Event()

    def put(self, update: pb.SequenceUpdate) -> None:
        """Adds an update; never waits. What a slow reader leaves is bounded by its sequences' max_new_tokens."""
        self._updates.append(update)
        self._ready.set()

    def announce_draining(self) -> None:
        """Lets the next message say that the worker is leaving."""
        self._draining = True
        self._ready.set()

    async def messages(self) -> AsyncIterator[pb.TokenStreamResponse]:
        """Everything put since the last message, for ever."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            updates, self._updates = self._updates, []
            draining, self._draining = self._draining, False
            yield pb.TokenStreamResponse(updates=updates, draining=draining)


@dataclass(frozen=True)
class Subscription:
    """Where one sequence's tokens go: an outbox, and the router's handle there."""

    outbox: TokenOutbox
    handle: int

    def send(
        self,
        *,
        tokens: Sequence[int] = (),
        text: str = "",
        finish_reason: public.FinishReason = public.FINISH_REASON_UNSPECIFIED,
        logprobs: Sequence[public.TokenLogprobs] = (),
    ) -> None:
        """Tokens and text, and a report for each token or none; with a reason, the last update."""
        update = pb.SequenceUpdate(
            handle=self.handle, token_ids=tokens, text=text, finish_reason=finish_reason, logprobs=logprobs
        )
        self.outbox.put(update)

    def fail(self, error: ServiceError) -> None:
        """The last update of a sequence that failed."""
        message = pb.SequenceError(code=code_number(error), reason=error.reason, message=error.message)
        self.outbox.put(pb.SequenceUpdate(handle=self.handle, error=message))
