"""What a policy may change in the pass itself. Such a pass serves its policy alone: hidden states depend on it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any

import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.statistics import Statistic

Measured = Mapping[Statistic[Any], Any]
"""What was measured in one layer: at least what the policy declared."""


class SparsePrefill(ABC):  # noqa: B024 - each method has a sensible default
    """The changes to one pass over one prompt; a fresh one is made for each. Plain causal attention alone is covered.

    Called in the model thread by the observer of the pass, for layer 0, 1 ... in this order.
    """

    def survivors(self, layer: int, before: Measured) -> torch.Tensor | None:
        """Which tokens enter `layer` and all deeper ones; the others end here: nothing more is computed for them.

        Asked before each layer but the first until it answers, so tokens are dropped once.

        Args:
            layer: Index of the layer that comes next.
            before: What was measured in the layer before it.

        Returns:
            Positions in the prompt, ascending, int64, the last token among them; None lets all go on.
        """
        return None

    def lender(self, layer: int) -> int | None:
        """The layer below whose keys and values `layer` attends to in place of its own; it has its own itself."""
        return None

    def attend(self, layer: LayerAttention, measured: Measured) -> torch.Tensor:
        """Attention output of a layer over the keys that it reads; by default causal.

        Returns:
            [num_query_heads, num_tokens of the layer, head_dim].
        """
        return causal_attention(layer.query, layer.key, layer.value, layer.scaling)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of tokens in ascending order among themselves, [num_query_heads, tokens, head_dim].

    Args:
        query: [num_query_heads, tokens, head_dim].
        key: [num_kv_heads, tokens, head_dim].
        value: As `key`.
        scaling: Factor of the logits.
    """
    return torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=scaling, enable_gqa=True
    )[0]
