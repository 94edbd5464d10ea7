"""Errors as OpenAI's clients know them: a status, an error object, and headers that say when to try again."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from shared.errors import InternalError, InvalidRequestError, ServiceError, TooLargeError, UnavailableError

log = logging.getLogger(__name__)

BODY_TIMEOUT = "BODY_TIMEOUT"

# By the codes of the one error tree. What workers say to each other ends a request only by a bug, hence 500.
STATUSES: Mapping[str, int] = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "FAILED_PRECONDITION": 500,
    "ABORTED": 500,
    "DATA_LOSS": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
# Where waiting does not help, or it was the client who took too long.
STATUSES_BY_REASON: Mapping[str, int] = {TooLargeError.default_reason: 413, BODY_TIMEOUT: 408}

TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# Codes that clients of this API look for; other errors show their reason.
CODES: Mapping[str, str] = {
    "UNAUTHENTICATED": "invalid_api_key",
    "NOT_FOUND": "model_not_found",
    "OUT_OF_RANGE": "context_length_exceeded",
}
# For an error that will pass and does not say when.
RETRY_AFTER_S = 1.0


class InvalidFieldError(InvalidRequestError):
    """A field of the request's JSON is wrong.

    Args:
        param: Which one, as in `messages[0].content`.
    """

    default_reason: ClassVar[str] = "INVALID_FIELD"

    def __init__(self, message: str, *, param: str = "", **more: Any) -> None:
        super().__init__(f"{param}: {message}" if param else message, **more)
        self.param = param


def known(error: Exception, what: str) -> ServiceError:
    """`error`, or what its client is told of a bug in `what`, whose trace goes to the log."""
    if isinstance(error, ServiceError):
        return error
    log.error("bug in %s", what, exc_info=error)
    return InternalError("internal error; the server's log has the details")


def status_of(error: ServiceError) -> int:
    """The HTTP status."""
    return STATUSES_BY_REASON.get(error.reason, STATUSES[error.code])


def body_of(error: ServiceError) -> dict[str, Any]:
    """OpenAI's error object."""
    status = status_of(error)
    param = error.param if isinstance(error, InvalidFieldError) else ""
    return error_object(
        error.message, kind=_type_of(status), code=CODES.get(error.code, error.reason.lower()), param=param
    )


def error_object(message: str, *, kind: str, code: str, param: str = "") -> dict[str, Any]:
    """The same, of an error that is not of our tree."""
    return {"error": {"message": message, "type": kind, "param": param or None, "code": code}}


def headers_of(error: ServiceError) -> dict[str, str]:
    """When to try again, and whether: OpenAI's clients would otherwise also repeat what cannot help."""
    headers = {"x-should-retry": str(error.retryable).lower()}
    wait_s = error.retry_after_s
    if wait_s is None and isinstance(error, UnavailableError):
        wait_s = RETRY_AFTER_S
    if wait_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(wait_s)))
        headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
    if error.code == "UNAUTHENTICATED":
        headers["www-authenticate"] = "Bearer"
    if error.reason in STATUSES_BY_REASON:
        # the rest of the body is not read
        headers["connection"] = "close"
    return headers


def _type_of(status: int) -> str:
    return TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
