"""A decoder-only forward pass written out: full-size attention matrices, explicit masks, float64. The sparse passes'
twin: a token that was dropped is one that nobody sees any more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


class Rule:
    """What a naive method decides; as it stands, nothing."""

    def left_before(self, layer: int, attention: list[torch.Tensor], present: list[int]) -> list[int]:
        """Positions that enter a layer, given the attention [heads, tokens, tokens] of those before."""
        return present

    def lender(self, layer: int) -> int | None:
        """The layer whose keys and values this one attends to."""
        return None

    def attending(self, attention: torch.Tensor, present: list[int]) -> list[int]:
        """Positions that attend among themselves in a layer whose plain causal attention is this."""
        return present


@dataclass
class NaivePass:
    """Logits [vocab] of the last position; per layer who was there, who attended, keys and values [heads, tokens, dim]
    and the plain causal attention [heads, tokens, tokens] of those who were there."""

    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    present: list[list[int]] = field(default_factory=list)
    attended: list[list[int]] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)


@torch.inference_mode()
def naive_pass(model: Any, embeddings: torch.Tensor, rule: Rule) -> NaivePass:
    """Runs float64 embeddings [tokens, hidden] through the language part of a float64 model."""
    decoder, done = model.get_decoder(), NaivePass()
    tokens = len(embeddings)
    cos, sin = decoder.rotary_emb(embeddings[None], torch.arange(tokens)[None])
    hidden, present = embeddings, list(range(tokens))
    for index, layer in enumerate(decoder.layers):
        present = rule.left_before(index, done.attention, present)
        there = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            part(normed).view(tokens, -1, there.head_dim).transpose(0, 1)
            for part in (there.q_proj, there.k_proj, there.v_proj)
        )
        query, key = (_rotated(part, cos[0], sin[0]) for part in (query, key))
        lender = rule.lender(index)
        if lender is not None:
            key, value = done.keys[lender], done.values[lender]
        attention = _attention(query, key, present)
        among = rule.attending(attention, present)
        group = len(query) // len(key)
        out = _attention(query, key, among) @ value.repeat_interleave(group, dim=0)
        hidden = hidden + there.o_proj(out.transpose(0, 1).reshape(tokens, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        done.present.append(present)
        done.attended.append(among)
        done.keys.append(key)
        done.values.append(value)
        done.attention.append(attention)
    done.logits = model.lm_head(decoder.norm(hidden))[-1]
    return done


def _attention(query: torch.Tensor, key: torch.Tensor, among: list[int]) -> torch.Tensor:
    """Causal softmax among few positions; zeros in all other rows and columns."""
    tokens = query.shape[1]
    group = len(query) // len(key)
    logits = query @ key.repeat_interleave(group, dim=0).mT * query.shape[2] ** -0.5
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for row in among:
        seen[row, [column for column in among if column <= row]] = True
    return logits.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def _rotated(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = vectors.shape[-1] // 2
    turned = torch.cat((-vectors[..., half:], vectors[..., :half]), dim=-1)
    return vectors * cos + turned * sin
