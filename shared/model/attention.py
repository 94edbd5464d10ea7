"""The one attention function that transformers' modeling code calls in both halves of the service.

It does nothing itself: the `LayerHook` that the caller passed to the model's forward (`vlc=hook`) attends. That
keyword travels down to every attention layer, so nothing is stored on the model and requests cannot mix. Only the
text configuration uses our names; vision towers keep their own attention.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PREFILL_ATTENTION = "vlcache_prefill"
DECODE_ATTENTION = "vlcache_decode"
# What models pass that changes nothing here: a window is in the mask, or in what the KV pool shows of a sequence, keys
# and queries come rotated, and some arguments of `forward` travel down to every layer.
HARMLESS_TERMS = frozenset({"sliding_window", "position_ids", "use_cache", "logits_to_keep", "image_sizes"})


class LayerHook(Protocol):
    """Called once per layer and forward pass, on the model's thread, in layer order."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attention output of one layer.

        Args:
            layer: Index of the layer.
            query: [batch, num_query_heads, num_queries, head_dim], rotated.
            key: [batch, num_kv_heads, num_keys, head_dim], rotated.
            value: As `key`.
            mask: Additive or boolean mask broadcastable to [batch, heads, queries, keys]; None is plain causal.
            scaling: Factor of the logits.

        Returns:
            [batch, num_queries, num_query_heads, head_dim].
        """


def vlcache_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    vlc: LayerHook | None = None,
    **terms: Any,
) -> tuple[torch.Tensor, None]:
    """Signature of transformers' `AttentionInterface`; see `LayerHook.attend` for shapes.

    Raises:
        NotImplementedError: The model passes something that we do not know: computing without it may be wrong.
    """
    if vlc is None:
        raise ValueError("this model can only be run with a LayerHook: pass vlc= to forward")
    unknown = sorted(name for name, term in terms.items() if term is not None and name not in HARMLESS_TERMS)
    if unknown or dropout:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'dropout'} is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # torch types every attribute as Tensor | Module
    return vlc.attend(layer, query, key, value, attention_mask, scale), None


def prompt_mask(*, q_length: int, **terms: Any) -> torch.Tensor | None:
    """Signature of transformers' `AttentionMaskInterface`; None whenever plain causal attention is enough.

    A single query sees all keys. sdpa_mask knows that, too, but not in every version while a CUDA graph is captured,
    and a decode step over the prefill model must not get a mask: it reads its own ragged pool.
    """
    return None if q_length == 1 else sdpa_mask(q_length=q_length, **terms)


AttentionInterface.register(PREFILL_ATTENTION, vlcache_attention)
AttentionInterface.register(DECODE_ATTENTION, vlcache_attention)
# Without a registered mask function a model gets no mask at all, silently: right for decode alone.
AttentionMaskInterface.register(PREFILL_ATTENTION, prompt_mask)
