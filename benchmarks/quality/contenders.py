"""Policies as they are written on the command line: `name` or `name:parameter=value,parameter=value`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.quality.oracle import ORACLE, answer_tokens, build_oracle
from models.shapes_vlm.questions import Sample
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.registry import POLICIES, build_policy

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is compared.

    Attributes:
        label: As it was written.
        policy_for: The policy for a question; only an oracle's depends on it.
        optional: Nobody has named it: it is left out where the model refuses it.
    """

    label: str
    policy_for: Callable[[Sample, PromptShape], Policy]
    optional: bool = False


def contenders_of(written: Sequence[str]) -> tuple[Contender, ...]:
    """Each once, in the order in which they were written; `all` stands for every policy with its defaults, as far as
    the model allows it.

    Raises:
        InvalidRequestError: An unknown policy or parameter, or a value of the wrong type or range.
        ValueError: A parameter without a value.
    """
    names = [name for text in written for name in (sorted(POLICIES) if text == ALL else [text])]
    return tuple(replace(_contender(name), optional=name not in written) for name in dict.fromkeys(names))


def _contender(written: str) -> Contender:
    name, colon, listed = written.partition(":")
    parameters = _parameters(written, listed.split(",") if colon else [])
    if name != ORACLE:
        policy = build_policy(name, parameters)
        return Contender(label=written, policy_for=lambda sample, prompt: policy)
    build_oracle((), parameters)  # to refuse bad parameters now

    def oracle_for(sample: Sample, prompt: PromptShape) -> Policy:
        return build_oracle(answer_tokens(sample, prompt), parameters)

    return Contender(label=written, policy_for=oracle_for)


def _parameters(written: str, listed: Sequence[str]) -> dict[str, object]:
    pairs = [pair.partition("=") for pair in listed]
    for key, _, value in pairs:
        if not (key and value):
            raise ValueError(f"{written!r} is not of the form name:parameter=value,parameter=value")
    return {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> object:
    """A number or a truth value as JSON writes it, else a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
