"""Errors to rich gRPC statuses and back (`google.rpc.Status` with ErrorInfo and RetryInfo)."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from shared import errors

DOMAIN = "vlcache"
# The text travels twice, percent-encoded and in base64, and gRPC refuses metadata above 8 KiB.
MAX_MESSAGE_BYTES = 1024


# the direct subclasses: one per code; deeper ones only name a reason
ERROR_BY_CODE: dict[str, type[errors.ServiceError]] = {cls.code: cls for cls in errors.ServiceError.__subclasses__()}


def to_status(error: errors.ServiceError, *, worker: str = "") -> grpc.Status:
    """The gRPC status of an error; `worker` reports it, and had it unless the error names another one."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    info.metadata["retryable"] = "true" if error.retryable else "false"
    for key, value in (("worker", error.worker or worker), ("stage", error.stage)):
        if value:
            info.metadata[key] = value
    details = [_packed(info)]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    message = _shortened(error.message)
    return rpc_status.to_status(status_pb2.Status(code=code_number(error), message=message, details=details))


def code_number(error: errors.ServiceError) -> int:
    """The canonical gRPC code of an error."""
    return int(getattr(grpc.StatusCode, error.code).value[0])


def error_class(code: str, reason: str) -> type[errors.ServiceError]:
    """The class of a code's name, or the one below it that stands for `reason`."""
    cls = ERROR_BY_CODE.get(code, errors.InternalError)
    return next((sub for sub in cls.__subclasses__() if sub.default_reason == reason), cls)


def from_rpc_error(error: grpc.RpcError) -> errors.ServiceError:
    """The error that another service meant; connection failures become `UnavailableError`."""
    info, retry_after_s = _details(error)
    cls = error_class(error.code().name, info.reason)
    if not info.reason and cls is errors.UnavailableError:
        # grpc's own text names addresses
        return cls("the worker cannot be reached", reason="WORKER_UNREACHABLE")
    return cls(
        error.details() or error.code().name,
        reason=info.reason,
        retry_after_s=retry_after_s,
        stage=info.metadata.get("stage", ""),
        worker=info.metadata.get("worker", ""),
    )


def _details(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    info, retry_after_s = error_details_pb2.ErrorInfo(), None
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # details that do not belong to the status: not ours
        status = None
    for detail in status.details if status else ():
        retry = error_details_pb2.RetryInfo()
        if not detail.Unpack(info) and detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return info, retry_after_s


def _shortened(message: str) -> str:
    raw = message.encode()
    if len(raw) <= MAX_MESSAGE_BYTES:
        return message
    return raw[: MAX_MESSAGE_BYTES - 3].decode(errors="ignore") + "…"


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
