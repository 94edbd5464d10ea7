"""One reservation on a decode worker, and the sequence that runs on it."""

from __future__ import annotations

from collections.abc import Sequence

from vlcache.worker.v1 import decode_pb2

from router.admission.admission import Lease
from router.background import Background
from router.requests.inbox import Inbox
from router.stages import DECODE
from router.workers.token_stream import STREAM_BROKE, Attachment
from router.workers.worker import TOKENS, Worker
from shared.errors import ServiceError


class Attempt:
    """Fills `inbox` from `attach` until it is closed. Closing leaves nothing on the decode worker.

    The request attaches when the prefill worker has said all its tokens: so no later token can overtake them.
    """

    def __init__(self, lease: Lease, inbox: Inbox, background: Background) -> None:
        self.lease = lease
        self._inbox = inbox
        self._background = background
        self._attachment: Attachment | None = None
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
        return self._attachment is not None

    def attach(self, delivered: Sequence[int]) -> None:
        """Asks the decode worker for the tokens behind `delivered`."""
        self._attachment = self.worker.tokens.attach(self.lease.ticket.token, self._heard, delivered=delivered)

    def close(self) -> None:
        """Gives the decode memory back. Idempotent; does not wait, because a cancelled handler cannot."""
        if not self._open:
            return
        self._open = False
        if self._attachment is not None:
            self._attachment.cancel()
        self.lease.end()
        if self._reserved:
            self._background.spawn(self.lease.release())

    def _heard(self, said: decode_pb2.SequenceUpdate | ServiceError) -> None:
        if isinstance(said, ServiceError):
            said.at(DECODE, self.worker.info.name)
            assert self._attachment is not None
            if said.reason != STREAM_BROKE or self._attachment.reports_break():
                self.lease.decode_charge.failed(TOKENS, said)
        elif said.finish_reason:
            # the worker holds nothing of it any more
            self._reserved = False
            self.lease.decode_charge.succeeded(TOKENS)
        self._inbox.put_nowait((self, said))
