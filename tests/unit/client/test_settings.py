import dataclasses
import json
import math
import re

import pytest
from vlcache import Compression, RetryPolicy, Sampling, Timeout, Wire
from vlcache.v1 import inference_pb2

WRONG = [
    (Timeout, {"connect_s": 0}),
    (Timeout, {"total_s": math.inf}),
    (Timeout, {"total_s": math.nan}),
    (Timeout, {"first_token_s": -1}),
    (RetryPolicy, {"max_attempts": 0}),
    (RetryPolicy, {"initial_backoff_s": 0}),
    (RetryPolicy, {"initial_backoff_s": 2, "max_backoff_s": 1}),
    (RetryPolicy, {"multiplier": 0.5}),
    (RetryPolicy, {"jitter": 1.5}),
    (Sampling, {"max_new_tokens": 0}),
    (Sampling, {"temperature": -0.1}),
    (Sampling, {"temperature": math.nan}),
    (Sampling, {"top_p": 0}),
    (Sampling, {"top_p": 1.1}),
    (Sampling, {"top_k": -1}),
    (Sampling, {"seed": -1}),
    (Sampling, {"seed": 2**64}),
    (Sampling, {"stop": "\n"}),
    (Sampling, {"stop": ("",)}),
    (Compression, {"retention": 0}),
    (Compression, {"retention": 1.01}),
    (Compression, {"max_kept_tokens": 0}),
    (Compression, {"retention": 0.5, "max_kept_tokens": 5}),
    (Wire, {"bits": 3}),
    (Wire, {"key_channels": 0}),
    (Wire, {"key_channels": math.nan}),
    (Wire, {"group": 7}),
    (Wire, {"residual": -1}),
    (Wire, {"residual": 2**32}),
    (Compression, {"budget_scope": "text"}),
    (Compression, {"min_retention": 0}),
    (Sampling, {"json_schema": "{"}),
    (Sampling, {"json_schema": "[]"}),
    (Sampling, {"json_schema": "[" * 50_000}),
    (Sampling, {"regex": ""}),
    (Sampling, {"regex": "a" * 70_000}),
    (Sampling, {"choices": []}),
    (Sampling, {"choices": "yes"}),
    (Sampling, {"choices": ["yes", ""]}),
    (Sampling, {"regex": "a", "grammar": "start: /a/"}),
    (Compression, {"min_retention": 1.5}),
    (Compression, {"max_dropped_attention": -0.1}),
    (Compression, {"max_dropped_attention": math.nan}),
]


@pytest.mark.parametrize(("setting", "values"), WRONG)
def test_a_wrong_value_is_refused_by_name(setting, values):
    with pytest.raises(ValueError, match=list(values)[-1]):
        setting(**values)


@pytest.mark.parametrize("setting", [Timeout, RetryPolicy, Sampling, Compression, Wire])
def test_settings_have_defaults_and_are_frozen(setting):
    value = setting()
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 1)


def test_what_is_left_out_stays_absent_on_the_wire():
    assert Sampling().to_proto().ByteSize() == 0
    assert Compression().to_proto().ByteSize() == 0


def test_zero_is_a_choice_and_not_absence():
    params = Sampling(temperature=0.0, top_k=0, seed=0).to_proto()
    assert params.HasField("temperature")
    assert params.HasField("top_k")
    assert params.HasField("seed")


def test_every_setting_reaches_its_field():
    params = Sampling(
        max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=4, seed=2**64 - 1, stop=("a", "b"), ignore_eos=True
    ).to_proto()
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k) == (9, 0.5, 0.9, 4)
    assert (params.seed, list(params.stop), params.ignore_eos) == (2**64 - 1, ["a", "b"], True)

    params = Compression(policy="knorm", max_kept_tokens=64, parameters={"window": 32, "pool": "max"}).to_proto()
    assert (params.policy, params.max_kept_tokens) == ("knorm", 64)
    assert dict(params.parameters.items()) == {"window": 32.0, "pool": "max"}
    assert Compression(retention=1.0).to_proto().retention == 1.0
    assert not Compression().to_proto().HasField("wire")
    params = Compression(wire=Wire(bits=4, key_channels=0.6, group=64, residual=0)).to_proto().wire
    assert (params.bits, params.key_channels, params.group, params.residual) == (4, 0.6, 64, 0)
    assert params.HasField("residual")
    params = Wire(bits=2).to_proto()
    assert not params.HasField("group")
    assert not params.HasField("residual")
    assert Compression(budget_scope="visual").to_proto().budget_scope == inference_pb2.BUDGET_SCOPE_VISUAL
    assert Compression(min_retention=0.05).to_proto().min_retention == 0.05
    strictest = Compression(max_dropped_attention=0).to_proto()
    assert strictest.HasField("max_dropped_attention")
    assert Compression(max_dropped_attention=0.03).to_proto().max_dropped_attention == 0.03
    assert Compression(explain=True).to_proto().explain


def test_a_form_reaches_its_field():
    schema = {"type": "integer"}
    assert json.loads(Sampling(json_schema=schema).to_proto().constraint.json_schema) == schema
    assert Sampling(json_schema='{"a": 1}').to_proto().constraint.json_schema == '{"a": 1}'
    assert Sampling(regex="a|b").to_proto().constraint.regex == "a|b"
    assert Sampling(grammar="start: /a/").to_proto().constraint.grammar == "start: /a/"
    assert not Sampling().to_proto().HasField("constraint")


def test_choices_are_a_regular_expression_that_means_nothing_else():
    choices = ["a.b", "(x|y)", "new\nline", "50 %", "über", "\\d"]
    regex = Sampling(choices=choices).to_proto().constraint.regex
    for choice in choices:
        assert re.fullmatch(regex, choice)
    for other in ("aXb", "x", "newXline", "5", ""):
        assert not re.fullmatch(regex, other)


def test_a_parameter_that_is_no_json_value_is_refused():
    with pytest.raises(ValueError):
        Compression(parameters={"when": object()}).to_proto()
