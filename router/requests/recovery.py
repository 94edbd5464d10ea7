"""How an answer goes on when a worker has failed it."""

from __future__ import annotations

from dataclasses import dataclass

from router.requests.parcels import Parcel
from router.stages import DECODE, TRANSFER
from router.workers.worker import Worker
from shared.errors import (
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    InternalError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)

# The three ways, cheapest first: the first two answer a failure, the last one foresees it.
RESEND, REPREFILL, MIGRATION = "resend", "reprefill", "migration"

# The cause lies in the worker or on the way to it: it is gone, was restarted, drains, ran out of time (UNAVAILABLE,
# FAILED_PRECONDITION), let go of the request (ABORTED, NOT_FOUND), or bytes were damaged (DATA_LOSS). Another worker
# need not fail. What lies in the request or in its size fails everywhere and is the client's to hear.
OF_THE_WORKER = (UnavailableError, FailedPreconditionError, AbortedError, NotFoundError, DataLossError)


@dataclass(frozen=True)
class Loss:
    """A worker has failed a request."""

    error: ServiceError
    """Names stage and worker."""
    worker: Worker | None
    """Who is at fault; None where nobody is."""
    parcel_gone: bool
    """Whether its parcel cannot be sent again."""


class LostError(Exception):
    """A request cannot go on where it is."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.error.message)
        self.loss = loss


class Recovery:
    """Chooses the cheapest way that is left to one request, and bounds how often."""

    def __init__(self, max_failovers: int) -> None:
        self.avoid: set[Worker] = set()
        """Workers that have failed the request: asked again only where no other is ready."""
        self._left = max_failovers
        self._may_repeat_bug = True

    def note(self, loss: Loss) -> None:
        """Counts a loss; returns when it is worth another worker.

        A decode step that fails (INTERNAL) fails for its whole batch, of which most had no part in it: that is worth
        one more worker, and not a third one, whose batch the guilty sequence would fail as well. A prompt fails alone.

        Raises:
            ServiceError: The error of `loss`, which the client has to hear.
        """
        if not self._left or not (isinstance(loss.error, OF_THE_WORKER) or self._is_first_bug(loss.error)):
            raise loss.error
        self._left -= 1
        if loss.worker is not None:
            self.avoid.add(loss.worker)

    def _is_first_bug(self, error: ServiceError) -> bool:
        if not isinstance(error, InternalError) or error.stage not in (TRANSFER, DECODE) or not self._may_repeat_bug:
            return False
        self._may_repeat_bug = False
        return True


def is_of_receiver(error: ServiceError, receiver: Worker) -> bool:
    """Whether what a prefill worker reports is that the decode worker has not taken its parcel."""
    return error.stage == TRANSFER and error.worker == receiver.info.name


def way_after(loss: Loss, parcel: Parcel | None) -> str:
    """The cheaper of the ways that are left: resend the parcel where it still is, else compute the prompt again."""
    return REPREFILL if loss.parcel_gone or parcel is None or parcel.gone else RESEND
