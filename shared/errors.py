"""The one error tree of the services.

A servicer raises these, `shared.rpc.interceptor` turns them into gRPC statuses, and `shared.rpc.status` turns the
statuses of other services back into them. Everything else that escapes a servicer is a bug and becomes INTERNAL
with a generic text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar


class ServiceError(Exception):
    """A failure that a caller can understand.

    Args:
        message: One sentence for a human; never library texts, addresses or paths.
        reason: Stable UPPER_SNAKE identifier for programs (`google.rpc.ErrorInfo.reason`).
        retry_after_s: How long the caller should wait before trying again, if that helps.
        stage: Where in a request's life it happened; empty where that says nothing.
        worker: Name of the process that it happened in; empty means the one that reports it.
    """

    code: ClassVar[str] = "INTERNAL"
    default_reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        retry_after_s: float | None = None,
        stage: str = "",
        worker: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_after_s = retry_after_s
        self.stage = stage
        self.worker = worker

    def at(self, stage: str, worker: str) -> ServiceError:
        """Names stage and worker where the error does not say them itself; returns the error."""
        self.stage = self.stage or stage
        self.worker = self.worker or worker
        return self


@contextlib.contextmanager
def at_stage(stage: str) -> Iterator[None]:
    """Errors that pass name the stage, unless they do so themselves."""
    try:
        yield
    except ServiceError as error:
        error.at(stage, worker="")
        raise


class InternalError(ServiceError):
    """A bug, here or in the worker that was asked."""


class InvalidRequestError(ServiceError):
    """A parameter or an image that can never work."""

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_REQUEST"


class ContextTooLongError(ServiceError):
    """Prompt and answer do not fit the model's context."""

    code = "OUT_OF_RANGE"
    default_reason = "CONTEXT_TOO_LONG"


class NotFoundError(ServiceError):
    """An unknown model, or a reservation that has ended."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class DuplicateRequestError(ServiceError):
    """A request with the same id is still in flight."""

    code = "ALREADY_EXISTS"
    default_reason = "DUPLICATE_REQUEST"


class ResourceExhaustedError(ServiceError):
    """No memory or no queue place at present."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "RESOURCE_EXHAUSTED"
    retryable = True


class TooLargeError(ResourceExhaustedError):
    """More than this worker has in all: waiting does not help."""

    default_reason = "TOO_LARGE"
    retryable = False


class UnavailableError(ServiceError):
    """No worker can be reached, or this one is draining."""

    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"
    retryable = True


class FailedPreconditionError(ServiceError):
    """Epoch, compatibility hash or layout do not match."""

    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class AlreadyCommittedError(FailedPreconditionError):
    """A second delivery of a parcel that may be installed only once."""

    default_reason = "ALREADY_COMMITTED"


class AbortedError(ServiceError):
    """The request was ended elsewhere (released, lease expired)."""

    code = "ABORTED"
    default_reason = "ABORTED"


class DataLossError(ServiceError):
    """A checksum or digest does not match."""

    code = "DATA_LOSS"
    default_reason = "DATA_LOSS"


class DeadlineExceededError(ServiceError):
    """The deadline passed; the message names the stage."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class UnauthenticatedError(ServiceError):
    """The caller does not say who it is, or nobody knows it."""

    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(ServiceError):
    """The caller is known, and may not do this."""

    code = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class RequestCancelledError(ServiceError):
    """The caller went away."""

    code = "CANCELLED"
    default_reason = "CANCELLED"
