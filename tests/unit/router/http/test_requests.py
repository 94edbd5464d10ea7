"""Every field of the JSON, and what it becomes in the request of the gRPC API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import json_format
from vlcache.v1 import inference_pb2 as pb

from router.http.errors import InvalidFieldError
from router.http.requests import to_request
from router.http.schema import MAX_STRUCTURE, ChatRequest, parse
from tests.unit.router.http.served import chat


def parsed(**fields: Any) -> ChatRequest:
    return parse(json.dumps(chat(**fields)).encode())


def sampling(**fields: Any) -> pb.SamplingParams:
    return to_request(parsed(**fields)).sampling


def compression(**fields: Any) -> pb.CompressionParams:
    return to_request(parsed(**fields)).compression


def refusal(body: bytes) -> InvalidFieldError:
    with pytest.raises(InvalidFieldError) as caught:
        parse(body)
    return caught.value


def test_what_is_not_said_is_left_to_the_server() -> None:
    assert to_request(parsed()) == pb.GenerateRequest(sampling={}, compression={})


def test_null_is_absent() -> None:
    fields = set(ChatRequest.model_fields) - {"messages"}
    assert to_request(parsed(**dict.fromkeys(fields))) == to_request(parsed())


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"temperature": 0.5, "top_p": 1}, {"temperature": 0.5, "top_p": 1.0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"max_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_completion_tokens": 8, "max_tokens": 7}, {"max_new_tokens": 8}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"n": 3}, {"n": 3}),
        ({"presence_penalty": 1, "frequency_penalty": -0.5}, {"presence_penalty": 1.0, "frequency_penalty": -0.5}),
        ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": {5: -100.0, 7: 1.5}}),
        ({"top_k": 40, "repetition_penalty": 1.2}, {"top_k": 40, "repetition_penalty": 1.2}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_tokens": 2, "ignore_eos": True}, {"min_new_tokens": 2, "ignore_eos": True}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
    ],
)
def test_sampling(fields: dict[str, Any], params: dict[str, Any]) -> None:
    assert sampling(**fields) == pb.SamplingParams(**params)


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"retention": 0.25, "policy": "streaming"}, {"retention": 0.25, "policy": "streaming"}),
        ({"explain": True}, {"explain": True}),
        ({"max_kept_tokens": 64}, {"max_kept_tokens": 64}),
        ({"min_retention": 0.1, "max_dropped_attention": 0.5}, {"min_retention": 0.1, "max_dropped_attention": 0.5}),
        ({"budget_scope": "visual"}, {"budget_scope": pb.BUDGET_SCOPE_VISUAL}),
        ({"budget_scope": "cache"}, {"budget_scope": pb.BUDGET_SCOPE_CACHE}),
        ({"wire": {"bits": 4, "group": 64}}, {"wire": pb.WireParams(bits=4, group=64)}),
        ({"wire": {"key_channels": 0.5, "residual": 0}}, {"wire": pb.WireParams(key_channels=0.5, residual=0)}),
    ],
)
def test_compression(fields: dict[str, Any], params: dict[str, Any]) -> None:
    assert compression(**fields) == pb.CompressionParams(**params)


def test_parameters_of_a_policy_are_any_json() -> None:
    given = {"window": 8, "shared_heads": False, "names": ["a", None], "more": {"share": 0.5}}
    assert json_format.MessageToDict(compression(policy_parameters=given).parameters) == given


def test_the_rest() -> None:
    request = to_request(parsed(model="toy", priority=-3, request_id="r-1"), header_id="another")
    assert (request.model, request.priority, request.request_id) == ("toy", -3, "r-1")


@pytest.mark.parametrize(("header", "request_id"), [("abc-1", "abc-1"), ("not an id", ""), ("x" * 129, ""), ("", "")])
def test_the_id_of_the_header_counts_where_it_is_one(header: str, request_id: str) -> None:
    assert to_request(parsed(), header_id=header).request_id == request_id


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"retention": 0.1, "max_kept_tokens": 5}, "max_kept_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        to_request(parsed(**fields))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"n": True}, "n"),
        ({"n": -1}, "n"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1.[key]"),
        ({"wire": {"bits": "4"}}, "wire.bits"),
        ({"budget_scope": "text"}, "budget_scope"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 3}}]}]},
            "messages[0].content[0].image_url.url",
        ),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(json.dumps(chat(**fields)).encode())
    assert (error.param, error.code) == (param, "INVALID_ARGUMENT")
    assert error.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'"text"',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "a"}]}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
        b'{"seed": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "a"}]}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_no_body_does_more_than_be_refused(body: bytes) -> None:
    assert refusal(body).code == "INVALID_ARGUMENT"


def test_a_body_of_nothing_but_structure_is_refused_before_it_is_parsed() -> None:
    body = b'{"z": [' + b"{}," * MAX_STRUCTURE + b"1]}"
    assert "commas and brackets" in refusal(body).message


def test_depth_ends_before_the_struct_does() -> None:
    """The parser's limit is below that of what takes the parameters over."""
    deep: Any = 1
    for _ in range(90):
        deep = [deep]
    given = parsed(policy_parameters={"deep": deep})
    with pytest.raises(InvalidFieldError, match="too deep"):
        to_request(given)
