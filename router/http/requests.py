"""A chat request in JSON as the request of the gRPC API; its messages are `router.http.messages`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format, struct_pb2
from vlcache.v1 import inference_pb2 as pb

from router.http.constraint import constraint_of
from router.http.errors import InvalidFieldError
from router.http.schema import ChatRequest
from router.validation import REQUEST_ID

# Fields here, and their names there.
SAMPLING: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "ignore_eos": "ignore_eos",
    "stop": "stop",
    "n": "n",
}
COMPRESSION = ("policy", "min_retention", "max_dropped_attention", "explain")
SCOPES = {"cache": pb.BUDGET_SCOPE_CACHE, "visual": pb.BUDGET_SCOPE_VISUAL}


def to_request(asked: ChatRequest, *, header_id: str = "") -> pb.GenerateRequest:
    """Everything but the messages.

    Args:
        header_id: The id in a header, which stands for one in the request where it is a valid one.

    Raises:
        InvalidFieldError: Fields contradict each other.
    """
    return pb.GenerateRequest(
        request_id=asked.request_id or valid_id(header_id),
        model=asked.model,
        sampling=_sampling(asked),
        compression=_compression(asked),
        priority=asked.priority,
    )


def valid_id(text: str) -> str:
    """An id as clients may choose it; empty where it is none."""
    return text if REQUEST_ID.fullmatch(text) else ""


def _sampling(asked: ChatRequest) -> pb.SamplingParams:
    given = {there: value for here, there in SAMPLING.items() if (value := getattr(asked, here)) is not None}
    sampling = pb.SamplingParams(**given, logprobs=_logprobs(asked), constraint=constraint_of(asked))
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if most is not None:
        sampling.max_new_tokens = most
    if asked.top_k is not None:
        # vLLM's -1 keeps all, as 0 does
        sampling.top_k = 0 if asked.top_k == -1 else asked.top_k
    if asked.seed is not None:
        sampling.seed = asked.seed % 2**64
    return sampling


def _logprobs(asked: ChatRequest) -> int | None:
    if asked.logprobs:
        return asked.top_logprobs or 0
    if asked.top_logprobs:
        raise InvalidFieldError("it needs logprobs", param="top_logprobs")
    return None


def _compression(asked: ChatRequest) -> pb.CompressionParams:
    given = {name: value for name in COMPRESSION if (value := getattr(asked, name)) is not None}
    compression = pb.CompressionParams(**given)
    if asked.retention is not None and asked.max_kept_tokens is not None:
        raise InvalidFieldError("a request has a retention or max_kept_tokens", param="max_kept_tokens")
    if asked.retention is not None:
        compression.retention = asked.retention
    if asked.max_kept_tokens is not None:
        compression.max_kept_tokens = asked.max_kept_tokens
    if asked.policy_parameters is not None:
        compression.parameters.CopyFrom(_struct(asked.policy_parameters))
    if asked.budget_scope is not None:
        compression.budget_scope = SCOPES[asked.budget_scope]
    if asked.wire is not None:
        compression.wire.CopyFrom(pb.WireParams(**asked.wire.model_dump(include=_WIRE, exclude_none=True)))
    return compression


_WIRE = {"bits", "key_channels", "group", "residual"}


def _struct(given: dict[str, Any]) -> struct_pb2.Struct:
    try:
        return json_format.ParseDict(given, struct_pb2.Struct())
    except json_format.ParseError as error:
        raise InvalidFieldError("too deep, or no numbers and texts", param="policy_parameters") from error
