"""What an answer must look like: OpenAI's and vLLM's ways to say it, as the one `Constraint` of the gRPC API."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from vlcache.v1 import inference_pb2 as pb

from router.http.errors import InvalidFieldError
from router.http.schema import ChatRequest, ResponseFormat

# OpenAI's json_object: any JSON object.
ANY_OBJECT = '{"type": "object"}'
# What has a meaning in regular expressions of any kind; `re.escape` escapes more than some of them know.
SPECIAL = re.compile(r"[\\.^$*+?{}\[\]|()]")


def constraint_of(request: ChatRequest) -> pb.Constraint | None:
    """The constraint of a request; None where it has none.

    Raises:
        InvalidFieldError: It has several, or one that says nothing.
    """
    asked = [*_of_openai(request.response_format), *_of_vllm(request)]
    if len(asked) > 1:
        names = " and ".join(name for name, _ in asked)
        raise InvalidFieldError(f"one request has one constraint, not {names}", param=asked[1][0])
    return asked[0][1] if asked else None


def _of_openai(given: ResponseFormat | None) -> list[tuple[str, pb.Constraint]]:
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [("response_format", pb.Constraint(json_schema=ANY_OBJECT))]
    if given.json_schema is None:
        raise InvalidFieldError("type json_schema needs it", param="response_format.json_schema")
    return [("response_format", pb.Constraint(json_schema=json.dumps(given.json_schema.schema_)))]


def _of_vllm(request: ChatRequest) -> list[tuple[str, pb.Constraint]]:
    asked = _constraints(
        "guided_",
        schema=request.guided_json,
        regex=request.guided_regex,
        choice=request.guided_choice,
        grammar=request.guided_grammar,
    )
    if (given := request.structured_outputs) is not None:
        schema = ANY_OBJECT if given.json_object and given.json_ is None else given.json_
        asked += _constraints(
            "structured_outputs.", schema=schema, regex=given.regex, choice=given.choice, grammar=given.grammar
        )
        if not asked:
            raise InvalidFieldError("it has none of json, regex, choice, grammar", param="structured_outputs")
    return asked


def _constraints(
    prefix: str,
    *,
    schema: dict[str, Any] | str | None,
    regex: str | None,
    choice: Sequence[str] | None,
    grammar: str | None,
) -> list[tuple[str, pb.Constraint]]:
    asked: list[tuple[str, pb.Constraint]] = []
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        asked.append((f"{prefix}json", pb.Constraint(json_schema=text)))
    if regex is not None:
        asked.append((f"{prefix}regex", pb.Constraint(regex=regex)))
    if choice is not None:
        if not choice:
            raise InvalidFieldError("there is nothing to choose from", param=f"{prefix}choice")
        asked.append((f"{prefix}choice", pb.Constraint(regex=any_of(choice))))
    if grammar is not None:
        asked.append((f"{prefix}grammar", pb.Constraint(grammar=grammar)))
    return asked


def any_of(choices: Sequence[str]) -> str:
    """A regular expression that matches these texts and no other."""
    escaped = (SPECIAL.sub(lambda found: "\\" + found[0], text) for text in choices)
    return "(" + "|".join(escaped) + ")"
