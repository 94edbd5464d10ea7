"""Sampling, budget and wire: what is refused and with which words, and exact shares."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from vlcache.v1 import inference_pb2 as pb

from shared.errors import InvalidRequestError
from shared.request.params import MIN_KEPT_TOKENS, Budget, BudgetScope, Wire
from shared.request.sampling import MAX_STOP_BYTES, MAX_STOP_STRINGS, Sampling

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("max_new_tokens", value) for value in (0, -1, -(2**31))],
        *[("temperature", value) for value in (-0.001, 100.1, 1e300, NAN, INF, -INF)],
        *[("top_p", value) for value in (0.0, -0.1, 1.0001, NAN, INF, -INF)],
        *[("top_k", value) for value in (-1, -(2**31))],
    ],
)
def test_a_bad_number_is_refused_naming_field_and_value(field: str, value: float) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Sampling(**{"max_new_tokens": 1, field: value})
    assert field in caught.value.message
    assert str(value) in caught.value.message
    assert caught.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("stop", [("",), ("ok", ""), ("x" * (MAX_STOP_BYTES + 1),), ("é" * (MAX_STOP_BYTES // 2 + 1),)])
def test_a_bad_stop_string_is_refused(stop: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError, match=f"1 to {MAX_STOP_BYTES} bytes"):
        Sampling(max_new_tokens=1, stop=stop)


def test_too_many_stop_strings_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_STOP_STRINGS}"):
        Sampling(max_new_tokens=1, stop=("x",) * (MAX_STOP_STRINGS + 1))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_p": 1.0},
        {"top_p": 5e-324},
        {"top_k": 0},
        {"top_k": 2**31 - 1},
        {"max_new_tokens": 2**31 - 1},
        {"seed": 2**64 - 1},
        {"stop": ("x" * MAX_STOP_BYTES,) * MAX_STOP_STRINGS},
    ],
)
def test_the_ends_of_every_range_are_accepted_and_survive_the_wire(values: dict[str, Any]) -> None:
    sampling = Sampling(**{"max_new_tokens": 1, **values})
    wire = sampling.to_proto().SerializeToString()
    assert Sampling.from_proto(pb.SamplingParams.FromString(wire), default_max_new_tokens=99) == sampling


def test_an_empty_message_is_greedy_and_keeps_every_token() -> None:
    assert Sampling.from_proto(pb.SamplingParams(), default_max_new_tokens=7) == Sampling(
        max_new_tokens=7, temperature=0.0, top_p=1.0, top_k=0, seed=0, stop=(), ignore_eos=False
    )


@pytest.mark.parametrize("message", [pb.SamplingParams(max_new_tokens=0), pb.SamplingParams(top_p=0)])
def test_a_zero_that_was_sent_is_not_taken_for_absent(message: pb.SamplingParams) -> None:
    with pytest.raises(InvalidRequestError):
        Sampling.from_proto(message, default_max_new_tokens=7)


@pytest.mark.parametrize("retention", [0.0, -0.1, 1.0001, 2.0, 1e300, NAN, INF, -INF])
def test_a_bad_retention_is_refused_and_explained(retention: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"kept share and must lie in \(0, 1\], not"):
        Budget(retention=retention)
    with pytest.raises(InvalidRequestError):
        Budget.from_proto(pb.CompressionParams(retention=retention), default_retention=0.1)


@pytest.mark.parametrize("tokens", [0, -1, -(2**63)])
def test_a_bad_token_budget_is_refused(tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"at least 1, not {tokens}"):
        Budget(max_kept_tokens=tokens)
    with pytest.raises(InvalidRequestError):
        Budget.from_proto(pb.CompressionParams(max_kept_tokens=tokens), default_retention=0.1)


def test_the_budget_of_a_message() -> None:
    def read(**fields: Any) -> Budget:
        return Budget.from_proto(pb.CompressionParams(**fields), default_retention=0.1)

    assert read() == Budget(retention=0.1)
    assert read(retention=0.3) == Budget(retention=0.3)
    assert read(max_kept_tokens=5) == Budget(max_kept_tokens=5)
    assert read(policy="vl_cache", retention=1.0) == Budget(retention=1.0)
    assert read(budget_scope=pb.BUDGET_SCOPE_CACHE) == Budget(retention=0.1)
    assert read(budget_scope=pb.BUDGET_SCOPE_VISUAL) == Budget(retention=0.1, scope=BudgetScope.VISUAL)
    assert read(max_kept_tokens=5, budget_scope=pb.BUDGET_SCOPE_VISUAL) == Budget(
        max_kept_tokens=5, scope=BudgetScope.VISUAL
    )


def test_a_scope_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="budget_scope is CACHE or VISUAL, not 7"):
        Budget.from_proto(pb.CompressionParams(budget_scope=7), default_retention=0.1)


def test_a_budget_of_the_visual_tokens_keeps_all_text() -> None:
    tenth = Budget(retention=0.1, scope=BudgetScope.VISUAL)
    assert tenth.kept_tokens_bound(50, 10_000) == 50 + 1_000 + 100
    assert tenth.kept_tokens_bound(50, 0) == 50


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_percentage_of_a_hundred_tokens_is_that_many_tokens(percent: int) -> None:
    """0.29 x 100 is 28.999… in binary: a token must not be lost to that."""
    assert int(Budget(retention=percent / 100).share_of(100) * 100) == percent


def test_shares_are_exact_also_for_tiny_retentions() -> None:
    assert Budget(retention=0.1).share_of(7) == Fraction(1, 10)
    assert Budget(retention=1e-7).share_of(7) == Fraction(1, 10**7)
    assert Budget(retention=1.0).share_of(7) == 1
    assert Budget(max_kept_tokens=3).share_of(7) == Fraction(3, 7)
    assert Budget(max_kept_tokens=2**63 - 1).share_of(7) == 1


@pytest.mark.parametrize("prompt", [1, MIN_KEPT_TOKENS - 1, MIN_KEPT_TOKENS])
def test_short_prompts_may_be_kept_whole(prompt: int) -> None:
    assert Budget(retention=0.01).kept_tokens_bound(0, prompt) == prompt


def test_the_bound_saves_memory_on_long_prompts() -> None:
    assert Budget(retention=0.1).kept_tokens_bound(0, 10_000) == 1_000 + 100
    assert Budget(max_kept_tokens=200).kept_tokens_bound(0, 10_000) == 200 + 100
    assert Budget(retention=1.0).kept_tokens_bound(0, 10_000) == 10_000


BAD_WIRES = [
    ("wire.bits", pb.WireParams(bits=3)),
    ("wire.bits", pb.WireParams(bits=16)),
    ("wire.key_channels", pb.WireParams(key_channels=-0.1)),
    ("wire.key_channels", pb.WireParams(key_channels=1.1)),
    ("wire.key_channels", pb.WireParams(key_channels=math.nan)),
    ("wire.group", pb.WireParams(bits=4, group=0)),
    ("wire.group", pb.WireParams(bits=4, group=7)),
    ("wire.group", pb.WireParams(bits=4, group=257)),
]


@pytest.mark.parametrize(("hint", "message"), BAD_WIRES)
def test_a_bad_wire_is_refused_by_name(hint: str, message: pb.WireParams) -> None:
    with pytest.raises(InvalidRequestError, match=hint):
        Wire.from_proto(message)


def test_a_wire_has_defaults_and_zero_is_a_choice() -> None:
    assert Wire.from_proto(pb.WireParams()) == Wire(bits=0, key_channels=1.0, group=32, residual=32)
    assert Wire.from_proto(pb.WireParams(bits=2, residual=0, group=64)) == Wire(bits=2, residual=0, group=64)
    assert Wire.from_proto(pb.WireParams(key_channels=0.6)) == Wire(key_channels=0.6)
    assert [wire.plain for wire in (Wire(), Wire(group=64), Wire(bits=8), Wire(key_channels=0.6))] == [1, 1, 0, 0]
