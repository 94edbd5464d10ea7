"""One reservation and everything that runs on it: the prefill call, then the decode sequence."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TypeAlias

from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.admission import Lease
from router.background import Background
from router.deadline import Deadline
from router.token_stream import Attachment
from router.worker import PROMPT, TOKENS
from shared.errors import ServiceError


@dataclass(frozen=True)
class PrefillEnded:
    """The last thing that is heard of a prefill call; no error means that it did all it had to."""

    error: ServiceError | None = None


# What reaches a request, from both workers and from its own timers, in one line.
Item: TypeAlias = "prefill_pb2.PrefillEvent | PrefillEnded | decode_pb2.SequenceUpdate | ServiceError"
Inbox: TypeAlias = "asyncio.Queue[Item]"


class Attempt:
    """Fills `inbox` until it is closed. Closing leaves nothing running on either worker.

    The decode worker is attached by `attach`, which the request calls when the prefill worker has said all its tokens:
    so no later token can overtake them.
    """

    def __init__(self, lease: Lease, inbox: Inbox, background: Background) -> None:
        self.lease = lease
        self.prefill_ended = False
        """Whether `PrefillEnded` was taken from the inbox; the request sets it."""
        self._inbox = inbox
        self._background = background
        self._pump: asyncio.Task[None] | None = None
        self._attachment: Attachment | None = None
        self._reserved = True
        self._open = True

    def start_prefill(self, message: pb.GenerateRequest, deadline: Deadline) -> None:
        """Sends the prompt to the prefill worker, with the budget that memory was promised for."""
        timeout_s = deadline.remaining_s()
        request = prefill_pb2.PrefillRequest(
            request=message,
            attempt=self.lease.attempt,
            ticket=self.lease.ticket,
            epoch=self.lease.pair.prefill.info.epoch,
        )
        self.lease.offer.budget.write_to(request.request.compression)
        self._pump = self._background.spawn(self._read_prefill(request, timeout_s))

    def attach(self) -> None:
        """Asks the decode worker for the tokens after the prefill worker's."""
        tokens = self.lease.pair.decode.tokens
        self._attachment = tokens.attach(self.lease.ticket.token, self._inbox.put_nowait)

    @property
    def attached(self) -> bool:
        """Whether the decode worker was asked."""
        return self._attachment is not None

    def sequence_ended(self) -> None:
        """The decode worker has sent the last token: it holds nothing any more."""
        self._reserved = False
        self.lease.decode_charge.succeeded(TOKENS)

    def release(self) -> None:
        """Gives the decode memory back. Idempotent."""
        if self._attachment is not None:
            self._attachment.cancel()
        if self._reserved:
            self._reserved = False
            self._background.spawn(self.lease.release())

    def close(self) -> None:
        """Ends whatever still runs. Idempotent; does not wait, because a cancelled handler cannot."""
        if not self._open:
            return
        self._open = False
        if self._pump is not None:
            self._pump.cancel()
        self.lease.end()
        self.release()

    async def _read_prefill(self, request: prefill_pb2.PrefillRequest, timeout_s: float | None) -> None:
        error: ServiceError | None = None
        events = self.lease.pair.prefill.client.prefill(request, timeout_s=timeout_s)
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self._inbox.put_nowait(event)
            self.lease.prefill_charge.succeeded(PROMPT)
        except ServiceError as service_error:
            error = service_error
            self.lease.prefill_charge.failed(PROMPT, error)
        finally:
            self.lease.prefill_charge.end()
        self._inbox.put_nowait(PrefillEnded(error))
