"""A whole model in double precision that masks what was evicted: what compressed decoding must compute."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForImageTextToText, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tests.families.loaded import Loaded

NAME = "families_oracle"
# per layer and KV head, positions that must not be seen
Evicted = list[list[list[int]]]


def masked_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float,
    evicted: Evicted | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    logits = query @ key.mT * scaling
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, -torch.inf)
    elif query.shape[2] > 1:
        logits = logits.masked_fill(torch.ones(logits.shape[2:]).triu(1).bool(), -torch.inf)
    for kv_head, positions in enumerate(evicted[module.layer_idx] if evicted else ()):
        logits[:, kv_head * group : (kv_head + 1) * group, :, positions] = -torch.inf
    return (logits.softmax(dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register(NAME, masked_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Oracle:
    """One prompt after its pass, and the steps that follow; windows are the model's own."""

    def __init__(self, loaded: Loaded) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(
            loaded.folder, dtype=torch.float64, attn_implementation={"text_config": NAME}
        ).eval()
        self._cache = DynamicCache()

    @torch.inference_mode()
    def prefill(self, inputs: dict[str, Any], evicted: Evicted | None = None) -> torch.Tensor:
        """Logits [vocab] of the first token, where nobody sees what is evicted."""
        self._cache = DynamicCache()
        doubled = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
        output = self._model(**doubled, past_key_values=self._cache, use_cache=True, evicted=evicted)
        return output.logits[0, -1]

    @torch.inference_mode()
    def step(self, token: int, position: int, evicted: Evicted) -> torch.Tensor:
        """Logits [vocab] behind `token`."""
        output = self._model(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.tensor([[position]]),
            past_key_values=self._cache,
            use_cache=True,
            evicted=evicted,
        )
        return output.logits[0, -1]
