"""The error tree of the client, and the one map from gRPC status codes to it."""

# The names are those of the status codes; a suffix on each would only repeat the base class.
# ruff: noqa: N818

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

STATUS_DETAILS_KEY = "grpc-status-details-bin"


class VlcacheError(Exception):
    """A call failed.

    message: what went wrong, in words.
    code: the gRPC status code.
    request_id: the id that the server's logs carry; empty for calls that have none.
    reason: stable upper-case word of the server for programs to compare; empty when it gave none.
    retryable: the same call may succeed later.
    retry_after_s: seconds that the server asks to wait before; None when it did not say.
    details: what else the server told, such as `stage` and `worker`.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        request_id: str = "",
        reason: str = "",
        retryable: bool = False,
        retry_after_s: float | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.request_id = request_id
        self.reason = reason
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.details = dict(details or {})

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.code.name, self.reason)))
        return f"{self.message} [{where}{', request ' + self.request_id if self.request_id else ''}]"


class InvalidRequest(VlcacheError):
    """A parameter is wrong, an image cannot be decoded, or the request is too large."""


class ContextTooLong(VlcacheError):
    """Prompt and answer together exceed the model's context."""


class NotFound(VlcacheError):
    """No such model."""


class AlreadyExists(VlcacheError):
    """A request with this id is still in flight, or another one had it and was answered in the last 60 s."""


class ResourceExhausted(VlcacheError):
    """The service is full; `retry_after_s` says when to come back."""


class Unavailable(VlcacheError):
    """The service cannot be reached, or a role has no worker left."""


class DeadlineExceeded(VlcacheError):
    """A time limit passed first."""


class Cancelled(VlcacheError):
    """The call was cancelled."""


class FailedPrecondition(VlcacheError):
    """The service is in a state that rules the call out."""


class Unauthenticated(VlcacheError):
    """The service does not know who calls."""


class PermissionDenied(VlcacheError):
    """The caller may not do this."""


class Aborted(VlcacheError):
    """The service gave the call up."""


class DataLoss(VlcacheError):
    """KV was corrupted on its way and could not be restored."""


class InternalError(VlcacheError):
    """A bug in the service, or two versions that do not understand each other."""


ERROR_BY_CODE: Mapping[grpc.StatusCode, type[VlcacheError]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.OUT_OF_RANGE: ContextTooLong,
    grpc.StatusCode.UNIMPLEMENTED: InternalError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
}


@dataclass(frozen=True, kw_only=True)
class _Details:
    """The rich details of a status: google.rpc.ErrorInfo and google.rpc.RetryInfo."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None


def error_from_rpc(error: grpc.RpcError, *, request_id: str = "") -> VlcacheError:
    """The error of the tree that a failed RPC stands for; `error` may be of the sync or the asyncio API."""
    code = error.code()
    details = _parse_details(error.trailing_metadata() or ())
    return ERROR_BY_CODE[code](
        error.details() or code.name,
        code=code,
        request_id=request_id,
        reason=details.reason,
        retryable=_is_retryable(code, details),
        retry_after_s=details.retry_after_s,
        details=details.metadata,
    )


def _is_retryable(code: grpc.StatusCode, details: _Details) -> bool:
    """The server's word counts; without it, only what is known to pass by itself is tried again."""
    if "retryable" in details.metadata:
        return details.metadata["retryable"].lower() == "true"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return details.retry_after_s is not None
    return code is grpc.StatusCode.UNAVAILABLE


def _parse_details(trailing_metadata: Iterable[tuple[str, str | bytes]]) -> _Details:
    status = status_pb2.Status()
    try:
        status.ParseFromString(dict(trailing_metadata).get(STATUS_DETAILS_KEY, b""))
        return _read_details(status)
    except DecodeError:
        # The status code alone still tells what happened; broken details must not hide it.
        return _Details()


def _read_details(status: status_pb2.Status) -> _Details:
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(info)
        has_retry = detail.Unpack(retry) or has_retry
    delay = retry.retry_delay
    return _Details(
        reason=info.reason,
        metadata=dict(info.metadata),
        retry_after_s=delay.seconds + delay.nanos / 1e9 if has_retry else None,
    )
