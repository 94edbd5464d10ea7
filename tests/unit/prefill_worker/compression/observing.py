"""Layers as a policy sees them, made without a model; and what is kept, as plain lists."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import Selection, statistics_for
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import last_rows
from prefill_worker.compression.statistics import ObservedLayer, measure_all


def prompt_shape(num_tokens: int, visual: Iterable[int] = (), seed: int = 0) -> PromptShape:
    """A prompt whose tokens at `visual` stand for images."""
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    mask[list(visual)] = True
    return PromptShape(visual=mask, seed=seed)


def random_attention(
    prompt: PromptShape, seed: int, *, num_kv_heads: int = 2, group: int = 2, head_dim: int = 8, spread: float = 2.0
) -> LayerAttention:
    """A layer of random queries, keys and values; a larger `spread` makes its attention sparser."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(heads, prompt.num_tokens, head_dim, generator=generator)

    return LayerAttention(
        prompt=prompt,
        query=draw(num_kv_heads * group) * spread,
        key=draw(num_kv_heads),
        value=draw(num_kv_heads),
        scaling=head_dim**-0.5,
    )


def observe(policy: Policy, layer: LayerAttention) -> ObservedLayer:
    """What the prefill pass hands to the pipeline for this layer."""
    measured = measure_all(statistics_for(policy, layer.prompt), layer)
    # the prompt's last tokens stand in for an answer's first ones
    ahead = layer.column_sums(last_rows(layer.prompt, policy.look_ahead)) if policy.look_ahead else None
    return ObservedLayer(prompt=layer.prompt, key=layer.key, value=layer.value, measured=measured, ahead=ahead)


def attention_matrix(layer: LayerAttention) -> torch.Tensor:
    """Brute force: [num_query_heads, num_tokens, num_tokens] float64, causal softmax of every row."""
    keys = layer.key.double().repeat_interleave(layer.group, dim=0)
    logits = layer.query.double() @ keys.mT * layer.scaling
    return logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)


def positions(chosen: torch.Tensor | Selection) -> list[list[int]]:
    """Kept positions of each KV head."""
    mask = chosen.chosen if isinstance(chosen, Selection) else chosen
    assert mask is not None
    return [row.nonzero().flatten().tolist() for row in mask]
