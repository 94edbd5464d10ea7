"""OpenAI's and vLLM's ways to say what an answer must look like."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as pb

from router.http.constraint import ANY_OBJECT, any_of
from router.http.errors import InvalidFieldError
from router.http.requests import to_request
from tests.unit.router.http.test_requests import parsed

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TEXT = json.dumps(SCHEMA)


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_schema": ANY_OBJECT}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            {"json_schema": TEXT},
        ),
        ({"guided_json": SCHEMA}, {"json_schema": TEXT}),
        ({"guided_json": TEXT}, {"json_schema": TEXT}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["yes", "no."]}, {"regex": r"(yes|no\.)"}),
        ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": TEXT}),
        ({"structured_outputs": {"json_object": True}}, {"json_schema": ANY_OBJECT}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a"]}}, {"regex": "(a)"}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, {"regex": "a"}),
    ],
)
def test_all_of_them_become_one_message(fields: dict[str, Any], constraint: dict[str, str]) -> None:
    assert to_request(parsed(**fields)).sampling.constraint == pb.Constraint(**constraint)


def test_text_is_no_constraint() -> None:
    assert not to_request(parsed(response_format={"type": "text"})).sampling.HasField("constraint")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_several_or_empty_ones_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        to_request(parsed(**fields))
    assert caught.value.param == param


@given(choices=st.lists(st.text(), min_size=1, max_size=4), other=st.text())
def test_a_choice_is_matched_as_it_is_and_nothing_else_is(choices: list[str], other: str) -> None:
    pattern = re.compile(any_of(choices))
    assert all(pattern.fullmatch(choice) for choice in choices)
    assert bool(pattern.fullmatch(other)) == (other in choices)
