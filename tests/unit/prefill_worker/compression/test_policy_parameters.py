"""What a request may say about a policy; everything else is refused with a sentence that names the culprit."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import prefill_pb2 as pb

from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.registry import DEFAULT_POLICY, POLICIES, build_policy
from prefill_worker.job import PrefillJob
from shared.errors import InvalidRequestError, ServiceError


def test_the_default_is_vl_cache_with_its_documented_parameters() -> None:
    assert build_policy("", {}) == build_policy("vl_cache", {}) == VLCache()
    expected = {
        "budget": "strict",
        "threshold": 0.01,
        "max_rows": 64,
        "recent_share": 0.1,
        "min_tokens": 16,
        "shared_heads": True,
    }
    assert {field.name: field.default for field in fields(VLCache)} == expected
    assert DEFAULT_POLICY in POLICIES


def test_the_recommended_policy_goes_by_its_own_name() -> None:
    policy = build_policy("recommended", {"tokens": 4.0})
    assert policy.name in POLICIES
    assert policy == build_policy("look_ahead", {"tokens": 4})


def test_whole_floats_become_the_integers_that_were_meant() -> None:
    policy = build_policy("vl_cache", {"max_rows": 50.0, "min_tokens": 1.0, "threshold": 1, "recent_share": 0})
    assert policy == VLCache(max_rows=50, min_tokens=1, threshold=1.0, recent_share=0.0)
    assert isinstance(policy.max_rows, int)
    assert isinstance(policy.threshold, float)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", "loose"),
        ("budget", 1.0),
        ("budget", True),
        ("budget", None),
        ("threshold", "0.01"),
        ("threshold", True),
        ("threshold", 0.0),
        ("threshold", -0.01),
        ("threshold", 1.01),
        ("threshold", NAN),
        ("threshold", INF),
        ("threshold", None),
        ("max_rows", 1.5),
        ("max_rows", -1.0),
        ("max_rows", True),
        ("max_rows", False),
        ("max_rows", NAN),
        ("max_rows", INF),
        ("max_rows", "64"),
        ("recent_share", -0.1),
        ("recent_share", 1.1),
        ("recent_share", NAN),
        ("recent_share", False),
        ("min_tokens", 0.0),
        ("min_tokens", 17.0),
        ("min_tokens", True),
        ("min_tokens", [4]),
        ("shared_heads", 1.0),
        ("shared_heads", 0),
        ("shared_heads", "true"),
        ("shared_heads", None),
        ("shared_heads", {"a": 1}),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        build_policy("vl_cache", {name: value})
    assert caught.value.reason == "POLICY_PARAMETER"


def test_an_unknown_parameter_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"has no parameter 'tau'.*threshold.*shared_heads") as caught:
        build_policy("vl_cache", {"tau": 1.0})
    assert caught.value.reason == "POLICY_PARAMETER"
    with pytest.raises(InvalidRequestError, match="name"):
        build_policy("vl_cache", {"name": "vl_cache"})


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"unknown policy 'none_such'; known: .*vl_cache") as caught:
        build_policy("none_such", {})
    assert caught.value.reason == "UNKNOWN_POLICY"


def outcome_of(work: Callable[[], Any]) -> Any:
    """What it returns, or the `ServiceError` that it raises; anything else fails the test."""
    try:
        return work()
    except ServiceError as error:
        return error


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@given(name=st.sampled_from([field.name for field in fields(VLCache)]), value=JSON)
def test_any_value_is_taken_or_refused(name: str, value: object) -> None:
    outcome = outcome_of(lambda: build_policy("vl_cache", {name: value}))
    if isinstance(outcome, InvalidRequestError):
        assert name in outcome.message
    else:
        assert type(getattr(outcome, name)) is type(getattr(VLCache(), name))


def prefill_request(**compression: object) -> pb.PrefillRequest:
    message = public.GenerateRequest(request_id="r", compression=public.CompressionParams(**compression))
    return pb.PrefillRequest(request=message, attempt=2, ticket=pb.Ticket(decode_address="d:1", lease_s=30))


def read_job(message: pb.PrefillRequest) -> PrefillJob:
    return PrefillJob.from_proto(message, epoch="e", vocabulary=300, default_max_new_tokens=7, default_retention=0.25)


def test_a_request_without_settings_gets_the_workers_defaults() -> None:
    job = read_job(prefill_request())
    assert (job.sampling.max_new_tokens, job.budget.retention, job.policy) == (7, 0.25, VLCache())
    assert (job.transfer.request_id, job.transfer.attempt, job.transfer.prefill_epoch) == ("r", 2, "e")


def test_parameters_travel_in_the_message() -> None:
    message = prefill_request(retention=0.5)
    message.request.compression.parameters.update({"max_rows": 8, "shared_heads": False, "budget": "paper"})
    assert read_job(message).policy == VLCache(max_rows=8, shared_heads=False, budget="paper")


@pytest.mark.parametrize("value", [NAN, INF, None, [1.0], {"a": 1.0}, "x", True])
def test_whatever_the_wire_can_carry_is_refused_with_a_sentence(value: object) -> None:
    message = prefill_request()
    message.request.compression.parameters["threshold"] = value
    with pytest.raises(InvalidRequestError, match="threshold"):
        read_job(message)


def test_a_parameter_without_a_value_is_refused() -> None:
    message = prefill_request()
    message.request.compression.parameters.fields["threshold"].SetInParent()
    with pytest.raises(InvalidRequestError, match="parameter"):
        read_job(message)


@given(retention=st.floats() | st.none(), tokens=st.integers(-3, 1 << 40) | st.none())
def test_any_budget_is_taken_or_refused(retention: float | None, tokens: int | None) -> None:
    budget = {"max_kept_tokens": tokens} if tokens is not None else {"retention": retention}
    given = {name: value for name, value in budget.items() if value is not None}
    outcome = outcome_of(lambda: read_job(prefill_request(**given)))
    assert isinstance(outcome, InvalidRequestError) or 0 < outcome.budget.share_of(100) <= 1
