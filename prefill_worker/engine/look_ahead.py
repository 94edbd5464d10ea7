"""The first tokens of an answer, decoded over the prompt's full KV while it is still at hand.

They are tokens of the answer like any other, and they show what it looks at: their attention says better than the
question's which KV the rest will need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

Draw = Callable[[torch.Tensor], int | None]
"""Takes the logits [vocab] fp32 of the next token; returns the token, or None to stop there."""


class LookAhead:
    """Decodes token after token after a pass, and adds up what they attend to; the pass's own tensors stay as they are.

    Args:
        model: The one that made the pass.
        windows: Of each layer how many tokens a query sees, itself included; 0 for all.
        keys: Per layer [num_kv_heads, num_tokens, head_dim] of the pass.
        values: As `keys`.
        room: Tokens that may be fed.

    Attributes:
        attention: Per layer, what each prompt token received, [num_kv_heads, num_tokens] fp32, summed over the fed
            tokens and the group.
        peaks: Per layer, the largest weight that a fed token gives each prompt token in a head of the group,
            [num_kv_heads, num_tokens] fp32.
        fed: Tokens whose KV is there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[int],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        room: int,
    ) -> None:
        self._model = model
        self._windows = windows
        self._prompt_tokens = keys[0].shape[1]
        self._keys = [_with_room(key, room) for key in keys]
        self._values = [_with_room(value, room) for value in values]
        self.attention = [key.new_zeros(key.shape[:2], dtype=torch.float32) for key in keys]
        self.peaks = [torch.zeros_like(received) for received in self.attention]
        self.fed = 0

    @torch.inference_mode()
    def run(self, token: int, position: int, steps: int, draw: Draw) -> None:
        """Feeds `token` at `position` and what is drawn after it, `steps` tokens at most."""
        for step in range(steps):
            logits = self._step(token, position + step)
            self.fed += 1
            drawn = draw(logits)
            if drawn is None:
                return
            token = drawn

    def keys(self) -> list[torch.Tensor]:
        """Per layer [num_kv_heads, num_tokens + fed, head_dim]."""
        return [key[:, : self._prompt_tokens + self.fed] for key in self._keys]

    def values(self) -> list[torch.Tensor]:
        """As `keys`."""
        return [value[:, : self._prompt_tokens + self.fed] for value in self._values]

    def _step(self, token: int, position: int) -> torch.Tensor:
        device = self._model.device
        output = self._model(
            input_ids=torch.tensor([[token]], device=device),
            position_ids=torch.tensor([[position]], device=device),
            past_key_values=self,
            use_cache=True,
            vlc=self,
        )
        return output.logits[0, -1].float()

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; one query, which sees everything, or what its window shows."""
        group = query[0].reshape(key.shape[1], -1, query.shape[3]).float()
        logits = group @ key[0].float().mT * scaling
        if self._windows[layer]:
            logits[:, :, : -self._windows[layer]] = -torch.inf
        weights = logits.softmax(dim=-1)
        received = weights[:, :, : self._prompt_tokens]
        self.attention[layer] += received.sum(dim=1)
        self.peaks[layer] = torch.maximum(self.peaks[layer], received.amax(dim=1))
        output = weights @ value[0].float()
        return output.to(query.dtype).view(1, 1, query.shape[1], -1)

    # What transformers asks of a cache.

    is_compileable = False

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the token's KV; returns that of all tokens, [1, num_kv_heads, tokens, head_dim]."""
        at = self._prompt_tokens + self.fed
        self._keys[layer_idx][:, at] = key[0, :, 0]
        self._values[layer_idx][:, at] = value[0, :, 0]
        return self._keys[layer_idx][None, :, : at + 1], self._values[layer_idx][None, :, : at + 1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the one that is fed."""
        return self._prompt_tokens + self.fed

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_seq_length`."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys, and the first of them."""
        return self.get_seq_length(layer_idx) + query_length, 0


def _with_room(rows: torch.Tensor, room: int) -> torch.Tensor:
    heads, tokens, head_dim = rows.shape
    roomy = rows.new_empty(heads, tokens + room, head_dim)
    roomy[:, :tokens] = rows
    return roomy
