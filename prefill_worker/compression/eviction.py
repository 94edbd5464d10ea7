"""The decode-time part of a policy, as it travels with the parcel: its numbers, and the scores that it begins with."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from prefill_worker.compression.pipeline import Selection, asked_retention
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.statistics import ObservedLayer
from shared.kv.eviction import SCORE_BYTES, Eviction
from shared.kv.layout import KVLayout
from shared.request.params import Budget, BudgetScope


def eviction_for(
    policy: Policy, prompt: PromptShape, budget: Budget, selections: Sequence[Selection], num_kv_heads: int
) -> Eviction | None:
    """What the policy wants; at retention 1 nothing that drops anything."""
    everything = torch.ones((), dtype=torch.bool).expand(num_kv_heads, prompt.num_tokens)
    chosen = [everything if each.chosen is None else each.chosen for each in selections]
    retention = _share_of_all(prompt, budget)
    eviction = policy.for_prompt(prompt).eviction(prompt, chosen, retention)
    return None if eviction is None or (retention == 1 and eviction.evicts) else eviction


def add_scores(
    policy: Policy,
    layers: Sequence[ObservedLayer],
    selections: Sequence[Selection],
    written: memoryview,
    room: memoryview,
) -> memoryview:
    """Writes the score of each kept row behind the KV: layer-major, head after head.

    Args:
        written: The beginning of `room`, which `parcel_bound` has measured.

    Returns:
        `room` up to the end of the scores.
    """
    policy = policy.for_prompt(layers[0].prompt)
    scored = zip(layers, selections, strict=True)
    scores = torch.cat([policy.accumulated(layer)[selection.chosen] for layer, selection in scored])
    end = len(written) + SCORE_BYTES * len(scores)
    torch.frombuffer(room[len(written) : end], dtype=torch.float32).copy_(scores)
    return room[:end]


def parcel_bound(policy: Policy, layout: KVLayout, kept_tokens_bound: int) -> int:
    """Bytes that suffice for a parcel whose layers and heads keep `kept_tokens_bound` on average."""
    rows = kept_tokens_bound * layout.num_layers * layout.num_kv_heads
    return layout.full_bytes(kept_tokens_bound) + (SCORE_BYTES * rows if policy.carries_scores else 0)


def shares_kept(chosen: Sequence[torch.Tensor]) -> tuple[Fraction, ...]:
    """The share of all tokens that each layer keeps."""
    return tuple(Fraction(int(layer.sum()), layer.numel()) for layer in chosen)


def _share_of_all(prompt: PromptShape, budget: Budget) -> Fraction:
    retention = asked_retention(prompt, budget)
    if budget.scope is BudgetScope.CACHE:
        return retention
    text = prompt.num_tokens - prompt.num_visual
    return (text + retention * prompt.num_visual) / prompt.num_tokens
