"""Every error of the one tree has a status, an object and headers that say when to try again."""

from __future__ import annotations

import pytest

from router.http.errors import STATUSES, InvalidFieldError, body_of, headers_of, known, status_of
from shared import errors
from shared.rpc.status import ERROR_BY_CODE, error_class


def test_no_code_is_unmapped() -> None:
    assert set(STATUSES) == {*ERROR_BY_CODE, errors.ServiceError.code}


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.InvalidRequestError("x"), 400, "invalid_request_error", "invalid_request"),
        (errors.UnauthenticatedError("x", reason="NO_TOKEN"), 401, "authentication_error", "invalid_api_key"),
        (errors.PermissionDeniedError("x", reason="TENANT"), 403, "permission_error", "tenant"),
        (errors.NotFoundError("x", reason="UNKNOWN_MODEL"), 404, "not_found_error", "model_not_found"),
        (errors.DuplicateRequestError("x"), 409, "invalid_request_error", "duplicate_request"),
        (errors.TooLargeError("x"), 413, "invalid_request_error", "too_large"),
        (errors.ResourceExhaustedError("x", reason="QUEUE_FULL"), 429, "rate_limit_error", "queue_full"),
        (errors.ContextTooLongError("x"), 400, "invalid_request_error", "context_length_exceeded"),
        (errors.UnavailableError("x", reason="NO_WORKER"), 503, "server_error", "no_worker"),
        (errors.DeadlineExceededError("x"), 504, "server_error", "deadline_exceeded"),
        (errors.DeadlineExceededError("x", reason="BODY_TIMEOUT"), 408, "invalid_request_error", "body_timeout"),
        (errors.InternalError("x"), 500, "server_error", "internal"),
    ],
)
def test_what_clients_see(error: errors.ServiceError, status: int, kind: str, code: str) -> None:
    assert status_of(error) == status
    assert body_of(error) == {"error": {"message": "x", "type": kind, "param": None, "code": code}}


def test_a_wrong_field_is_named() -> None:
    shown = body_of(InvalidFieldError("no number", param="temperature"))["error"]
    assert (shown["message"], shown["param"]) == ("temperature: no number", "temperature")


def test_when_to_come_back() -> None:
    wait = headers_of(errors.ResourceExhaustedError("x", retry_after_s=1.2345))
    assert (wait["retry-after"], wait["retry-after-ms"], wait["x-should-retry"]) == ("2", "1235", "true")
    assert headers_of(errors.UnavailableError("x"))["retry-after"] == "1"
    assert "retry-after" not in headers_of(errors.InvalidRequestError("x"))


def test_clients_are_told_not_to_repeat_what_cannot_help() -> None:
    for error in (errors.DeadlineExceededError("x"), errors.TooLargeError("x"), errors.InternalError("x")):
        assert headers_of(error)["x-should-retry"] == "false"


def test_a_bug_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert "secret" not in str(body_of(known(KeyError("secret"), "GET /x")))
    assert "bug in GET /x" in caplog.text
    assert "KeyError: 'secret'" in caplog.text


def test_the_errors_of_workers_are_still_what_they_were() -> None:
    assert error_class("INVALID_ARGUMENT", "INVALID_REQUEST") is errors.InvalidRequestError
