"""One reservation on a decode worker, and the sequences that run on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vlcache.worker.v1 import decode_pb2

from router.admission.admission import Lease
from router.background import Background
from router.requests.inbox import Inbox
from router.stages import DECODE
from router.workers.token_stream import STREAM_BROKE, Attachment
from router.workers.worker import TOKENS, Worker
from shared.errors import ServiceError


@dataclass(frozen=True)
class Source:
    """One answer of an attempt: who speaks in the inbox."""

    attempt: Attempt
    choice: int


class Attempt:
    """Fills `inbox` from `attach` until it is closed. Closing leaves nothing on the decode worker.

    An answer that fails is a loss of all that the attempt still draws.

    The request attaches when the prefill worker has said all its tokens: so no later token can overtake them.
    """

    def __init__(self, lease: Lease, inbox: Inbox, background: Background) -> None:
        self.lease = lease
        self._inbox = inbox
        self._background = background
        self._attachments: dict[int, Attachment] = {}
        self._unfinished: set[int] = set()
        self._reserved = True
        self._open = True

    @property
    def worker(self) -> Worker:
        """The decode worker."""
        return self.lease.pair.decode

    @property
    def is_open(self) -> bool:
        """Whether it was not closed yet."""
        return self._open

    @property
    def attached(self) -> bool:
        """Whether the decode worker was asked."""
        return bool(self._attachments)

    def attach(self, delivered: Mapping[int, Sequence[int]]) -> None:
        """Asks the decode worker for the tokens of answers, by choice, behind what was `delivered` of them.

        Those that were completed since their memory was reserved end there, too.
        """
        self._unfinished.update(delivered)
        for choice in self.lease.choices:
            sink, tokens = partial(self._heard, Source(self, choice)), delivered.get(choice, ())
            self._attachments[choice] = self.worker.tokens.attach(
                self.lease.ticket.token, sink, delivered=tokens, choice=choice
            )
            if choice not in delivered:
                self._attachments[choice].cancel()

    def close(self) -> None:
        """Gives the decode memory back. Idempotent; does not wait, because a cancelled handler cannot."""
        if not self._open:
            return
        self._open = False
        for attachment in self._attachments.values():
            attachment.cancel()
        self.lease.end()
        if self._reserved:
            self._background.spawn(self.lease.release())

    def _heard(self, source: Source, said: decode_pb2.SequenceUpdate | ServiceError) -> None:
        if isinstance(said, ServiceError):
            said.at(DECODE, self.worker.info.name)
            if said.reason != STREAM_BROKE or self._attachments[source.choice].reports_break():
                self.lease.decode_charge.failed(TOKENS, said)
        elif said.finish_reason:
            self._finished(source.choice)
        self._inbox.put_nowait((source, said))

    def _finished(self, choice: int) -> None:
        self._unfinished.remove(choice)
        if not self._unfinished:
            # the worker holds nothing of it any more
            self._reserved = False
            self.lease.decode_charge.succeeded(TOKENS)
