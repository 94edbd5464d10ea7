"""Policies that know the answer's patches: what a selection could reach if it knew what the answer will need.

    oracle              the answer's patches, then all text, then the tokens with most post-vision attention
    oracle:base=NAME    the policy NAME with its own scores and budgets, and the answer's patches above everything

No bound: a model may read the answer off other tokens than those it was drawn on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from models.shapes_vlm.questions import Sample
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.registry import build_policy
from prefill_worker.compression.rows import post_vision_rows
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer, Statistic

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
    return Informed(answer=answer, base=base)


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


@dataclass(frozen=True, kw_only=True)
class Informed(Policy):
    """A policy that is told the answer's patches; everything else is its own."""

    name: ClassVar[str] = ORACLE

    answer: tuple[int, ...]
    """Positions of the answer's patches."""
    base: Policy
    """Who is told."""

    def for_prompt(self, prompt: PromptShape) -> Informed:
        """Whoever runs in the base's place is told instead."""
        return replace(self, base=self.base.for_prompt(prompt))

    def needs(self, prompt: PromptShape) -> tuple[Statistic[Any], ...]:
        """The base's."""
        return self.base.needs(prompt)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """The base's, but for the answer."""
        return _raise_answer(self.base.score(layer), self.answer)

    def allocate(self, layers: Sequence[ObservedLayer], budget: TokenBudget) -> list[int]:
        """The base's."""
        return self.base.allocate(layers, budget)

    def share_heads(self, scores: torch.Tensor, kept: int) -> list[int]:
        """The base's."""
        return self.base.share_heads(scores, kept)

    def select(self, scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """The base's."""
        return self.base.select(scores, kept)

    def merge(self, layer: ObservedLayer, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The base's."""
        return self.base.merge(layer, chosen)


def _raise_answer(scores: torch.Tensor, answer: tuple[int, ...]) -> torch.Tensor:
    raised = scores.clone()
    raised[:, list(answer)] = torch.inf
    return raised
