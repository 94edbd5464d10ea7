"""Which way is left, and how often."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from router.requests.recovery import REPREFILL, RESEND, Loss, Recovery, way_after
from shared import errors


def loss(error: errors.ServiceError | None = None, **changes: Any) -> Loss:
    values = {"error": error or errors.UnavailableError("gone"), "worker": object(), "parcel_gone": False}
    return Loss(**(values | changes))


@pytest.mark.parametrize(
    ("parcel_gone", "parcel", "way"),
    [
        (False, SimpleNamespace(gone=False), RESEND),
        (False, SimpleNamespace(gone=True), REPREFILL),
        (False, None, REPREFILL),
        (True, SimpleNamespace(gone=False), REPREFILL),
    ],
)
def test_the_parcel_is_sent_again_where_it_can_be(parcel_gone: bool, parcel: Any, way: str) -> None:
    assert way_after(loss(parcel_gone=parcel_gone), parcel) == way


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_so_many_losses_are_survived_and_every_lost_worker_is_avoided(limit: int) -> None:
    recovery = Recovery(limit)
    losses = [loss() for _ in range(limit + 1)]
    for each in losses[:limit]:
        recovery.note(each)
    with pytest.raises(errors.UnavailableError):
        recovery.note(losses[-1])
    assert recovery.avoid == {each.worker for each in losses[:limit]} if limit else not recovery.avoid


def test_a_parcel_that_is_gone_is_nobodys_fault() -> None:
    recovery = Recovery(4)
    recovery.note(loss(errors.NotFoundError("gone"), worker=None, parcel_gone=True))
    assert recovery.avoid == set()


@pytest.mark.parametrize(
    ("stage", "worth"), [("decode", True), ("transfer", True), ("prefill", False), ("select", False)]
)
def test_a_bug_is_tried_once_more_where_others_may_have_caused_it(stage: str, worth: bool) -> None:
    recovery = Recovery(4)
    if worth:
        recovery.note(loss(errors.InternalError("bug", stage=stage)))
    with pytest.raises(errors.InternalError):
        recovery.note(loss(errors.InternalError("bug", stage=stage)))


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError("bad"),
        errors.ContextTooLongError("long"),
        errors.ResourceExhaustedError("full"),
        errors.TooLargeError("large"),
        errors.DeadlineExceededError("late"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_everywhere_is_not_tried_elsewhere(error: errors.ServiceError) -> None:
    with pytest.raises(type(error)):
        Recovery(4).note(loss(error))
