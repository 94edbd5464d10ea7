"""Policies that watch, and one that repeats, what was chosen for another question."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.second_question.text_pass import SeenKeys
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import ObservedLayer

Choice = list[torch.Tensor]
"""Per layer [num_kv_heads, num_tokens] bool, what was kept."""


def watched(policy: Policy, choice: Choice) -> Policy:
    """The policy, which adds to `choice` what it selects, layer after layer; it is otherwise the same."""
    told = copy(policy)

    def select(scores: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        chosen = policy.select(scores, kept)
        choice.append(chosen)
        return chosen

    def for_prompt(prompt: PromptShape) -> Policy:
        other = policy.for_prompt(prompt)
        return told if other is policy else watched(other, choice)

    # policies are frozen; this one was made here
    for stage in (select, for_prompt):
        object.__setattr__(told, stage.__name__, stage)
    return told


@dataclass(frozen=True, kw_only=True)
class Repeated(Policy):
    """Keeps what a text pass was allowed to see, and the text."""

    name: ClassVar[str] = "repeated"

    def needs(self, prompt: PromptShape) -> tuple[SeenKeys]:
        """What the pass saw."""
        return (SeenKeys(),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """1 for what was seen."""
        return layer[SeenKeys()].float()

    def share_heads(self, scores: torch.Tensor, kept: int) -> list[int]:
        """As many as were seen, whatever the budget."""
        return scores.sum(dim=1).int().tolist()


def only_selects(kind: type[Policy]) -> bool:
    """Whether its selection is all that the policy does: no other pass, no merged rows, nothing while decoding."""
    return (kind.sparse_prefill, kind.merge, kind.eviction) == (Policy.sparse_prefill, Policy.merge, Policy.eviction)
