"""Changes to logits against loops over tokens, and against transformers where it has the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from shared.errors import InvalidRequestError
from shared.model.logits import LogitChanges
from shared.model.sampler import Sampler
from shared.request.sampling import MAX_BIASED_TOKENS, Sampling

VOCABULARY = 12
EOS = {3, 7}
tokens = st.integers(0, VOCABULARY - 1)
samplings = st.builds(
    Sampling,
    max_new_tokens=st.just(9),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.1, 10)),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32)).map(lambda bias: tuple(sorted(bias.items()))),
    min_new_tokens=st.integers(0, 4),
)


def twin(logits: list[float], sampling: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    """Token by token, in the order that the documentation gives."""
    changed = []
    for token, logit in enumerate(logits):
        logit += dict(sampling.logit_bias).get(token, 0.0)
        if token in EOS and len(answer) < sampling.min_new_tokens:
            logit = -math.inf
        if token in (*prompt, *answer):
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        if token in answer:
            logit -= sampling.presence_penalty + answer.count(token) * sampling.frequency_penalty
        changed.append(logit)
    return changed


def changes(sampling: Sampling, prompt: list[int], answer: list[int]) -> LogitChanges:
    made = LogitChanges(sampling, EOS, prompt)
    for token in answer:
        made.push(token)
    return made


@given(
    samplings,
    st.lists(tokens, max_size=6),
    st.lists(tokens, max_size=6),
    st.lists(st.floats(-30, 30, width=32), min_size=VOCABULARY, max_size=VOCABULARY),
)
def test_every_change_is_what_a_loop_makes(
    sampling: Sampling, prompt: list[int], answer: list[int], logits: list[float]
) -> None:
    given_logits = torch.tensor(logits)
    found = changes(sampling, prompt, answer).apply(given_logits)
    torch.testing.assert_close(found, torch.tensor(twin(logits, sampling, prompt, answer)), rtol=1e-5, atol=1e-4)
    assert given_logits.tolist() == logits, "the model's own logits are changed"


@given(st.lists(tokens, min_size=1, max_size=9), st.floats(0.1, 10), st.integers(0, 2**32))
def test_the_repetition_penalty_is_that_of_transformers(said: list[int], penalty: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(VOCABULARY) * 5
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([said]), logits[None].clone())[0]
    sampling = Sampling(max_new_tokens=1, repetition_penalty=penalty)
    half = len(said) // 2
    torch.testing.assert_close(changes(sampling, said[:half], said[half:]).apply(logits), expected)


def test_nothing_asked_is_nothing_changed() -> None:
    plain = Sampling(max_new_tokens=5)
    assert not plain.changes_logits
    assert plain.takes_highest
    assert Sampler(plain, EOS).takes_highest
    for field, value in {
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "repetition_penalty": 1.1,
        "logit_bias": ((1, 2.0),),
        "min_new_tokens": 1,
    }.items():
        changed = Sampling(**{"max_new_tokens": 5, field: value})
        assert changed.changes_logits, field
        assert not Sampler(changed, EOS).takes_highest, field
    reported = Sampling(max_new_tokens=5, logprobs=0)
    assert not reported.changes_logits
    assert not Sampler(reported, EOS).takes_highest


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_banned_token_is_never_drawn_and_a_forced_one_always(temperature: float) -> None:
    logits = torch.zeros(VOCABULARY)
    logits[5] = 20.0
    banned = Sampling(max_new_tokens=1, temperature=temperature, logit_bias=((5, -100.0),))
    forced = Sampling(max_new_tokens=1, temperature=temperature, logit_bias=((2, 100.0),))
    assert 5 not in {Sampler(banned, EOS).draw(logits, at).token for at in range(200)}
    assert {Sampler(forced, EOS).draw(logits, at).token for at in range(200)} == {2}


def test_logprobs_are_those_of_the_model_whatever_was_changed() -> None:
    torch.manual_seed(1)
    logits = torch.randn(VOCABULARY) * 3
    expected = logits.double().log_softmax(dim=0)
    sampling = Sampling(max_new_tokens=1, temperature=2.0, logit_bias=((4, 100.0),), logprobs=3, top_k=5)
    drawn = Sampler(sampling, EOS).draw(logits, 0)
    assert drawn.token == 4
    assert drawn.logprobs is not None
    assert drawn.logprobs.token == 4
    assert drawn.logprobs.logprob == pytest.approx(float(expected[4]), abs=1e-5)
    best = sorted(range(VOCABULARY), key=lambda token: -float(expected[token]))[:3]
    assert [token for token, _ in drawn.logprobs.top] == best
    for token, logprob in drawn.logprobs.top:
        assert logprob == pytest.approx(float(expected[token]), abs=1e-5)


def test_more_logprobs_than_tokens_are_all() -> None:
    drawn = Sampler(Sampling(max_new_tokens=1, logprobs=20), EOS).draw(torch.zeros(VOCABULARY), 0)
    assert drawn.logprobs is not None
    assert len(drawn.logprobs.top) == VOCABULARY


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.01, 2.01, math.nan)],
        *[("repetition_penalty", value) for value in (0.0, -1.0, 10.1, math.nan, math.inf)],
        *[("logit_bias", ((1, value),)) for value in (-100.5, 101.0, math.nan, math.inf)],
        ("logit_bias", tuple((token, 1.0) for token in range(MAX_BIASED_TOKENS + 1))),
        *[("min_new_tokens", value) for value in (-1, 10)],
        *[("logprobs", value) for value in (-1, 21)],
    ],
)
def test_a_bad_value_is_refused_by_its_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        Sampling(**{"max_new_tokens": 9, field: value})  # type: ignore[arg-type]


def test_a_token_that_the_model_does_not_have_is_refused() -> None:
    sampling = Sampling(max_new_tokens=1, logit_bias=((VOCABULARY, 1.0),))
    sampling.check_vocabulary(VOCABULARY + 1)
    with pytest.raises(InvalidRequestError, match="token 12"):
        sampling.check_vocabulary(VOCABULARY)


@given(samplings)
def test_what_is_asked_survives_the_wire(sampling: Sampling) -> None:
    wire = sampling.to_proto().SerializeToString()
    assert Sampling.from_proto(type(sampling.to_proto()).FromString(wire), default_max_new_tokens=1) == sampling
