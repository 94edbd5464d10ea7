"""Expected Attention (Devoto et al., arXiv 2510.00636): what future queries will look at, from their distribution.

Idea: queries of a layer, before their rotation, are about normally distributed; so the attention that a key can expect
from queries still to come follows from mean and covariance. No attention row is observed, nor the question known.

    mu, C   = mean and covariance over the prompt's unrotated queries but the first `sinks`, per query head
    R       = mean rotation of the next `future` positions after the prompt
    a_j     = softmax over keys j of  k_j . R mu / sqrt d  +  k_j^T R C R^T k_j / (2 d)      without the first `sinks`
    score_j = (mean over the group of a_j) * |v_j|                                           the first `sinks` stay

The same number of tokens in every layer. Own choice: a prompt's queries are unrotated again from the rotated ones, by
the model's own rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.selection import with_sinks
from prefill_worker.compression.statistics import ObservedLayer, Statistic

MAX_SINKS, MAX_FUTURE = 16, 4096


@dataclass(frozen=True)
class ExpectedFromQueries(Statistic[torch.Tensor]):
    """Expected attention times value norm, [num_kv_heads, num_tokens] fp32; 0 for the first tokens."""

    first_tokens: int
    horizon: int

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """See the module."""
        key, value = (tensor[:, self.first_tokens :].float() for tensor in (layer.key, layer.value))
        if key.shape[1] == 0:
            return layer.key.new_zeros(layer.key.shape[:2], dtype=torch.float32)
        mean, covariance = self._future_queries(layer)
        keys = key[:, None] * layer.scaling
        # [num_kv_heads, group, tokens]
        logits = (keys @ mean[..., None]).squeeze(-1) + ((keys @ covariance) * keys).sum(dim=-1) / 2
        expected = logits.softmax(dim=-1).mean(dim=1)
        return functional.pad(expected * value.norm(dim=-1), (self.first_tokens, 0))

    def _future_queries(self, layer: LayerAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [num_kv_heads, group, head_dim] and covariance [num_kv_heads, group, head_dim, head_dim], rotated."""
        queries = layer.query.float() if layer.rotation is None else layer.rotation.undo(layer.query)
        queries = queries[:, self.first_tokens :]
        mean = queries.mean(dim=1, keepdim=True)
        apart = queries - mean
        covariance = apart.mT @ apart / queries.shape[1]
        if layer.rotation is not None:
            turn = layer.rotation.mean_of_next(self.horizon)
            mean, covariance = mean @ turn.mT, turn @ covariance @ turn.mT
        by_group = (len(layer.key), layer.group)
        return mean[:, 0].unflatten(0, by_group), covariance.unflatten(0, by_group)


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """See the module."""

    name: ClassVar[str] = "expected_attention"
    monotone: ClassVar[bool] = True

    sinks: int = 4
    """First tokens that always stay and whose queries say nothing of later ones; in [0, 16]."""
    future: int = 512
    """Positions after the prompt whose queries are expected; in [1, 4096]."""

    def __post_init__(self) -> None:
        self.require(0 <= self.sinks <= MAX_SINKS, f"sinks must lie in [0, {MAX_SINKS}], not {self.sinks}")
        self.require(1 <= self.future <= MAX_FUTURE, f"future must lie in [1, {MAX_FUTURE}], not {self.future}")

    def needs(self, prompt: PromptShape) -> tuple[ExpectedFromQueries]:
        """The distribution of all queries, already turned into scores."""
        return (ExpectedFromQueries(self.sinks, self.future),)

    def score(self, layer: ObservedLayer) -> torch.Tensor:
        """As measured; the first tokens stay."""
        (expected,) = self.needs(layer.prompt)
        return with_sinks(layer[expected], self.sinks)
