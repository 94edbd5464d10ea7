"""Policies that know the answer's patches: what a selection could reach if it knew what the answer will need.

    oracle              the answer's patches, then all text, then the tokens with most post-vision attention
    oracle:base=NAME    the policy NAME with its own scores and budgets, and the answer's patches above everything

No bound: a model may read the answer off other tokens than those it was drawn on.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch

from models.shapes_vlm.questions import Sample
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.registry import build_policy
from prefill_worker.compression.rows import post_vision_rows
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer

ORACLE = "oracle"
# Above what attention gives: a token receives at most 1 from each row and query head, and there are at most 64 rows.
TEXT = 1e6


def answer_tokens(sample: Sample, prompt: PromptShape) -> tuple[int, ...]:
    """Positions of the visual tokens that carry the answer; images have equally many, one per patch."""
    visual = prompt.visual.nonzero().flatten().tolist()
    per_image = len(visual) // len(sample.images)
    return tuple(
        visual[image * per_image + patch] for image, patches in enumerate(sample.answer_patches) for patch in patches
    )


def build_oracle(answer: tuple[int, ...], parameters: Mapping[str, object]) -> Policy:
    """The oracle for one question.

    Raises:
        InvalidRequestError: Unknown base, or parameters that it refuses.
    """
    if "base" not in parameters:
        oracle = Oracle(answer=answer)
        oracle.require(not parameters, f"only base has parameters, not {', '.join(parameters)}")
        return oracle
    rest = {key: value for key, value in parameters.items() if key != "base"}
    base = build_policy(str(parameters["base"]), rest)
    base.require(not base.needs_own_pass, "chooses during its pass, before it could be told")
    return informed(base, answer)


@dataclass(frozen=True, kw_only=True)
class Oracle(Policy):
    """See the module; the same number of tokens in every layer."""

    name: ClassVar[str] = ORACLE

    answer: tuple[int, ...]
    """Positions of the answer's patches."""

    def needs(self, prompt: PromptShape) -> tuple[ColumnSums]:
        """Post-vision rows."""
        return (ColumnSums(post_vision_rows(prompt)),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """Answer, then text, then the rest, each by attention."""
        (sums,) = self.needs(layer.prompt)
        text = ~layer.prompt.visual.to(layer.key.device)
        return _raise_answer(layer[sums] + TEXT * text, self.answer)


def informed(policy: Policy, answer: tuple[int, ...]) -> Policy:
    """The policy with the answer's patches above everything; all other stages, now and to come, are its own."""
    told = copy(policy)

    def score(layer: ObservedLayer) -> torch.Tensor:
        return _raise_answer(policy.score(layer), answer)

    def for_prompt(prompt: PromptShape) -> Policy:
        other = policy.for_prompt(prompt)
        return told if other is policy else informed(other, answer)

    # policies are frozen; this one was made here
    for stage in (score, for_prompt):
        object.__setattr__(told, stage.__name__, stage)
    return told


def _raise_answer(scores: torch.Tensor, answer: tuple[int, ...]) -> torch.Tensor:
    raised = scores.clone()
    raised[:, list(answer)] = torch.inf
    return raised
