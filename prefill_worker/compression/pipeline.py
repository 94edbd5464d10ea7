"""Runs a policy over one prompt: observe -> score -> allocate -> select -> [merge]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from prefill_worker.compression.budget import share_surplus
from prefill_worker.compression.policy import Policy, TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import post_vision_rows
from prefill_worker.compression.sparse.prefill import SparsePrefill
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer, Statistic
from shared.request.params import Budget


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is kept of one layer.

    Attributes:
        chosen: [num_kv_heads, num_tokens] bool; None keeps everything.
        attention_mass: Share of the post-vision attention that falls on kept tokens.
        merged: Keys and values [kept rows, head_dim] that take the kept tokens' place, head after head; None ships
            the tokens as they are.
    """

    chosen: torch.Tensor | None
    attention_mass: float
    merged: tuple[torch.Tensor, torch.Tensor] | None = None

    def num_kept(self, num_kv_heads: int, num_tokens: int) -> list[int]:
        """Tokens of each KV head."""
        if self.chosen is None:
            return [num_tokens] * num_kv_heads
        return self.chosen.sum(dim=1).tolist()

    def followed_by(self, answer_tokens: int) -> Selection:
        """The same choice where so many tokens of the answer, all of them kept, follow the prompt's."""
        if answer_tokens == 0 or self.chosen is None:
            return self
        assert self.merged is None, "merged rows and an answer's are not put together"
        return replace(self, chosen=torch.nn.functional.pad(self.chosen, (0, answer_tokens), value=True))

    def indices(self, key: torch.Tensor, survivors: torch.Tensor | None = None) -> torch.Tensor:
        """Places of the kept tokens in `key` [num_kv_heads, num_tokens, ..], head after head, ascending; int32.

        Args:
            survivors: [num_tokens] bool, whom `key` holds where it is shorter than the prompt.
        """
        num_heads, num_tokens = key.shape[:2]
        if self.chosen is None:
            return torch.arange(num_tokens, dtype=torch.int32, device=key.device).repeat(num_heads)
        positions = self.chosen.flatten().nonzero().flatten() % self.chosen.shape[1]
        if survivors is not None and num_tokens < self.chosen.shape[1]:
            assert bool(survivors[positions].all()), "a dropped token has no KV to keep"
            positions = (survivors.cumsum(dim=0) - 1)[positions]
        return positions.int()


def statistics_for(policy: Policy, prompt: PromptShape) -> tuple[Statistic[Any], ...]:
    """What is measured in each layer: the policy's statistics, and what says how much attention was kept."""
    return tuple(dict.fromkeys((*policy.for_prompt(prompt).needs(prompt), _attention(prompt))))


def sparse_prefill_for(policy: Policy, prompt: PromptShape, budget: Budget, num_layers: int) -> SparsePrefill | None:
    """What the policy changes in the pass; a fresh one for each pass."""
    return policy.for_prompt(prompt).sparse_prefill(prompt, token_budget(prompt, budget, num_layers))


def asked_retention(prompt: PromptShape, budget: Budget) -> Fraction:
    """The kept share that the budget means, of all tokens or of the visual ones; 1 bypasses every policy."""
    return budget.retention_of(prompt.num_tokens - prompt.num_visual, prompt.num_visual)


def keep_everything(num_layers: int) -> list[Selection]:
    """Retention 1."""
    return [Selection(chosen=None, attention_mass=1.0)] * num_layers


def select_tokens(
    policy: Policy, layers: Sequence[ObservedLayer], budget: Budget, windows: Sequence[int] = ()
) -> list[Selection]:
    """One selection per layer; nothing is mixed across requests.

    Args:
        windows: As a `KVLayout` has them.
    """
    prompt = layers[0].prompt
    policy = policy.for_prompt(prompt)
    tokens = token_budget(prompt, budget, len(layers))
    text = prompt.num_tokens - tokens.num_tokens
    seen = [_seen_tokens(window, prompt) for window in windows or (0,) * len(layers)]
    shared = zip(layers, policy.allocate(layers, tokens), strict=True)
    kept = share_surplus([0 if layer.lender is not None else text + count for layer, count in shared], seen)
    selections: list[Selection] = []
    for layer, count, last in zip(layers, kept, seen, strict=True):
        if layer.lender is None:
            selections.append(_select_layer(policy, layer, count, last, keep_text=text > 0))
        else:
            selections.append(_borrowed(layer, selections[layer.lender]))
    return selections


def token_budget(prompt: PromptShape, budget: Budget, num_layers: int) -> TokenBudget:
    """What `allocate` shares out; of a budget of visual tokens these alone, all text being kept beside them."""
    scored = budget.tokens_of(prompt.num_tokens - prompt.num_visual, prompt.num_visual)
    return TokenBudget(retention=asked_retention(prompt, budget), num_tokens=scored, num_layers=num_layers)


def score_layer(policy: Policy, layer: ObservedLayer, *, keep_text: bool) -> torch.Tensor:
    """The policy's scores, above which text stays whatever comes where all of it is kept."""
    scores = policy.score(layer)
    return scores.masked_fill(~layer.prompt.visual.to(scores.device), torch.inf) if keep_text else scores


def _seen_tokens(window: int, prompt: PromptShape) -> int:
    """Last tokens of the prompt that the answer's first one sees in a layer."""
    return min(window - 1, prompt.num_tokens) if window else prompt.num_tokens


def _select_layer(policy: Policy, layer: ObservedLayer, kept: int, seen: int, *, keep_text: bool) -> Selection:
    scores = score_layer(policy, layer, keep_text=keep_text) if layer.scores is None else layer.scores
    hidden = layer.prompt.num_tokens - seen
    scores = scores[:, hidden:]
    # what a head wants may lie out of sight
    shares = [max(1, share) if hidden else share for share in policy.share_heads(scores, kept)]
    chosen = policy.select(scores, shares)
    assert chosen.sum(dim=1).tolist() == list(shares), "a score is not a number, or a policy miscounts"
    chosen = torch.nn.functional.pad(chosen, (hidden, 0))
    return Selection(chosen=chosen, attention_mass=_mass(layer, chosen), merged=policy.merge(layer, chosen))


def _borrowed(layer: ObservedLayer, lent: Selection) -> Selection:
    """Nothing of its own, and whatever the lender keeps to attend to."""
    assert lent.chosen is not None, "a policy chooses"
    return Selection(chosen=torch.zeros_like(lent.chosen), attention_mass=_mass(layer, lent.chosen))


def _mass(layer: ObservedLayer, chosen: torch.Tensor) -> float:
    """Share of the post-vision attention of a layer that falls on these tokens."""
    received = layer[_attention(layer.prompt)]
    return min(1.0, (received * chosen).sum().item() / received.sum().item())


def _attention(prompt: PromptShape) -> ColumnSums:
    return ColumnSums(post_vision_rows(prompt))
