"""The training forward pass: the same arithmetic as the Hugging Face model, arranged for many questions.

All tokens of a batch go through the linear layers as one flat [T, width] matrix; only attention looks at the
structure (one prefix per row, questions that see the prefix and themselves). Attention is plain bmm + softmax +
bmm with the GQA group folded into the query length: the bf16 backward of the fused attention is far slower on CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from models.shapes_vlm.training.batches import PrefixBatch, QuestionBatch
from models.shapes_vlm.training.pointwise import PLAIN, Pointwise

CONTEXT_LAYERS = 3
"""After so many layers the visual tokens are asked what they know of each other."""


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """[n, queries, head_dim] x [n, keys, head_dim] -> [n, queries, head_dim]; bias: [1, queries, keys]."""
    scale = q.shape[-1] ** -0.5
    if bias is None:
        scores = torch.bmm(q, k.transpose(1, 2)) * scale
    else:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v)


def _causal_bias(length: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """[1, repeats * length, length]: 0 where a query may look, -inf elsewhere."""
    bias = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    return bias.repeat(repeats, 1)[None]


def visual_features(
    model: LlavaForConditionalGeneration, patches: Tensor, kept: Tensor, pointwise: Pointwise = PLAIN
) -> Tensor:
    """Projected features of the kept patches: [images, K, text width]."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    dtype = embeddings.patch_embedding.weight.dtype
    positions = embeddings.position_embedding.weight
    x = F.linear(patches.to(dtype), embeddings.patch_embedding.weight.flatten(1)) + positions[kept + 1]
    first = (embeddings.class_embedding + positions[0]).expand(len(x), 1, -1)
    x = torch.cat((first, x), dim=1)

    def norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
        return pointwise.layer_norm(x, module.weight, module.bias, module.eps)

    x = norm(x, tower.pre_layrnorm)
    for layer in tower.encoder.layers:
        x = x + _vision_attention(layer.self_attn, norm(x, layer.layer_norm1))
        hidden = pointwise.quick_gelu(layer.mlp.fc1(norm(x, layer.layer_norm2)))
        x = x + layer.mlp.fc2(hidden)
    projector = model.model.multi_modal_projector
    projected: Tensor = projector.linear_2(F.gelu(projector.linear_1(x[:, 1:])))
    return projected


def _vision_attention(attention: Any, x: Tensor) -> Tensor:
    images, tokens, width = x.shape
    head_dim = 32

    def heads(projection: nn.Module) -> Tensor:
        y: Tensor = projection(x)
        return y.view(images, tokens, -1, head_dim).transpose(1, 2).reshape(-1, tokens, head_dim)

    y = _attend(heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj), None)
    y = y.view(images, -1, tokens, head_dim).transpose(1, 2).reshape(images, tokens, width)
    out: Tensor = attention.out_proj(y)
    return out


@dataclass(frozen=True, kw_only=True)
class TextOutput:
    """What a pass of the language model gives."""

    logits: Tensor
    """[n, vocabulary] of all answer tokens, group after group."""
    index: list[Tensor]
    """Per group, where those tokens are: [n_g, 3] (row, conversation, token)."""
    context: Tensor
    """[B * N, K, width] the visual tokens after the first CONTEXT_LAYERS layers."""


class TextPass:
    """One forward pass of the language model over a prefix batch and its groups of questions."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        prefix: PrefixBatch,
        groups: Sequence[QuestionBatch],
        pointwise: Pointwise = PLAIN,
    ) -> None:
        self._model, self._pointwise = model, pointwise
        self._text = model.model.language_model
        self._prefix, self._groups = prefix, groups
        config = model.config.text_config
        self._kv_heads, self._head_dim = config.num_key_value_heads, config.head_dim
        self._group_size = config.num_attention_heads // self._kv_heads
        self._rows, self._prefix_length = prefix.positions.shape
        self._sizes = [prefix.positions.numel(), *(group.token_ids.numel() for group in groups)]
        dtype = self._text.embed_tokens.weight.dtype
        self._cos, self._sin = self._rotary(dtype)
        lengths = [self._prefix_length, *(group.token_ids.shape[2] for group in groups)]
        self._biases = [_causal_bias(length, self._group_size, dtype) for length in lengths]

    def run(self, features: Tensor) -> TextOutput:
        """From the projected features of the kept patches [B * N, K, width] to the answers' logits."""
        x = self._embed(features)
        context = x
        for number, layer in enumerate(self._text.layers):
            context = x if number == CONTEXT_LAYERS else context
            x = x + self._attention(layer.self_attn, self._rms(x, layer.input_layernorm))
            hidden = self._rms(x, layer.post_attention_layernorm)
            gate_up = F.linear(hidden, torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)))
            x = x + layer.mlp.down_proj(self._pointwise.swiglu(gate_up))
        answers = [(group.targets >= 0).nonzero() for group in self._groups]
        parts = [
            part.view(*group.token_ids.shape, -1)[tuple(index.T)]
            for part, group, index in zip(x.split(self._sizes)[1:], self._groups, answers, strict=True)
        ]
        visual = context[: self._sizes[0]].view(self._rows, self._prefix_length, -1)[:, self._prefix.is_image]
        logits = self._model.lm_head(self._rms(torch.cat(parts), self._text.norm))
        return TextOutput(logits=logits, index=answers, context=visual.reshape(features.shape))

    def _rms(self, x: Tensor, norm: Any) -> Tensor:
        return self._pointwise.rms_norm(x, norm.weight, norm.variance_epsilon)

    def _embed(self, features: Tensor) -> Tensor:
        """Flat [T, width]: the prefix rows with the visual features in place, then the groups."""
        embed = self._text.embed_tokens
        prefix = embed(self._prefix.token_ids).expand(self._rows, -1, -1).clone()
        prefix[:, self._prefix.is_image] = features.view(self._rows, -1, features.shape[-1])
        return torch.cat((prefix.flatten(0, 1), *(embed(group.token_ids).flatten(0, 2) for group in self._groups)))

    def _rotary(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin per flat token: [T, 1, head_dim]."""
        positions = [self._prefix.positions.flatten()]
        for group in self._groups:
            steps = group.first_position + torch.arange(group.token_ids.shape[2])
            positions.append(steps.expand(group.token_ids.shape).flatten())
        rope = self._text.rotary_emb
        angles = torch.cat(positions)[:, None].float() * rope.inv_freq[None].float()
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _attention(self, attention: Any, x: Tensor) -> Tensor:
        weights = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        heads = F.linear(x, weights).view(len(x), -1, self._head_dim)
        num_rotated = self._kv_heads * (self._group_size + 1)
        rotated = self._pointwise.rotate(heads[:, :num_rotated], self._cos, self._sin)
        queries, keys = rotated.split((self._kv_heads * self._group_size, self._kv_heads), dim=1)
        parts = zip(
            queries.split(self._sizes), keys.split(self._sizes), heads[:, num_rotated:].split(self._sizes), strict=True
        )
        (q0, k0, v0), *others = parts
        k_prefix, v_prefix = self._prefix_heads(k0), self._prefix_heads(v0)
        outputs = [self._prefix_attention(q0, k_prefix, v_prefix)]
        for (q, k, v), group, bias in zip(others, self._groups, self._biases[1:], strict=True):
            outputs.append(self._question_attention(q, k, v, k_prefix, v_prefix, group, bias))
        out: Tensor = attention.o_proj(torch.cat(outputs))
        return out

    def _prefix_heads(self, x: Tensor) -> Tensor:
        """[B * P, Hkv, D] -> [B * Hkv, P, D]."""
        x = x.reshape(self._rows, self._prefix_length, self._kv_heads, self._head_dim)
        return x.transpose(1, 2).reshape(-1, self._prefix_length, self._head_dim)

    def _prefix_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (self._rows, self._prefix_length, self._kv_heads, self._group_size, self._head_dim)
        folded = q.reshape(shape).permute(0, 2, 3, 1, 4).reshape(len(k), -1, self._head_dim)
        y = _attend(folded, k, v, self._biases[0])
        y = y.view(self._rows, self._kv_heads, self._group_size, self._prefix_length, self._head_dim)
        return y.permute(0, 3, 1, 2, 4).reshape(self._rows * self._prefix_length, -1)

    def _question_attention(
        self, q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, group: QuestionBatch, bias: Tensor
    ) -> Tensor:
        """Each question sees the prefix of its row and itself, causally."""
        (b, questions, s), (h, g, d) = group.token_ids.shape, (self._kv_heads, self._group_size, self._head_dim)
        q = q.reshape(b, questions, s, h, g, d).permute(0, 3, 1, 4, 2, 5).reshape(b * h, questions * g * s, d)
        own_k, own_v = (
            x.reshape(b, questions, s, h, d).permute(0, 3, 1, 2, 4).reshape(b * h * questions, s, d) for x in (k, v)
        )
        scale = d**-0.5
        on_prefix = torch.bmm(q, k_prefix.transpose(1, 2)) * scale
        own_q = q.view(b * h * questions, g * s, d)
        on_self = torch.baddbmm(bias, own_q, own_k.transpose(1, 2), alpha=scale)
        scores = torch.cat((on_prefix, on_self.view(b * h, questions * g * s, s)), dim=-1).softmax(-1)
        to_prefix, to_self = scores.split((self._prefix_length, s), dim=-1)
        y = torch.bmm(to_self.reshape(b * h * questions, g * s, s), own_v).view_as(q)
        y = torch.baddbmm(y, to_prefix, v_prefix)
        return y.view(b, h, questions, g, s, d).permute(0, 2, 4, 1, 3, 5).reshape(b * questions * s, -1)
