"""One decode step over a ragged batch: transformers' language model, our attention, our pool."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from typing import Any

import torch
from transformers import PreTrainedModel

from decode_worker.sequence import Sequence
from shared.kernels.reference.slab_attention import slab_attention
from shared.model.sampler import sample


class DecodeEngine:
    """Runs in the step thread; holds no state between steps."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def step(self, batch: Batch[Sequence]) -> list[int]:
        """Feeds every sequence its last token and draws the next one; the KV of the fed tokens is appended."""
        logits = self.logits(batch)
        if all(sequence.sampling.temperature == 0 for sequence in batch):
            return logits.argmax(dim=-1).tolist()
        # the drawn token will stand one position after the fed one
        return [
            sample(row, sequence.sampling, sequence.next_position + 1)
            for row, sequence in zip(logits, batch, strict=True)
        ]

    @torch.inference_mode()
    def logits(self, batch: Batch[Sequence]) -> torch.Tensor:
        """Logits after the last token of every sequence, [batch, vocab] fp32."""
        output = self._model(
            input_ids=torch.tensor([[sequence.last_token] for sequence in batch]),
            position_ids=torch.tensor([[sequence.next_position] for sequence in batch]),
            past_key_values=_PoolCache(),
            use_cache=True,
            vlc=_BatchAttention(batch),
        )
        return output.logits[:, -1].float()


class _BatchAttention:
    """The `LayerHook` of one step: appends the new token's KV, then attends sequence by sequence.

    A loop of SDPA over contiguous slabs runs at memory bandwidth; padding the batch loses the padding's share.
    """

    def __init__(self, batch: Batch[Sequence]) -> None:
        self._batch = batch

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; one query per sequence."""
        assert mask is None, "a ragged batch has no mask"
        rows = [
            _attend_sequence(sequence, layer, query[i, :, 0], key[i, :, 0], value[i, :, 0], scaling)
            for i, sequence in enumerate(self._batch)
        ]
        return torch.stack(rows)[:, None]


def _attend_sequence(
    sequence: Sequence, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """query [num_query_heads, head_dim], key and value [num_kv_heads, head_dim] -> [num_query_heads, head_dim]."""
    groups, group_size = sequence.kv[layer], query.shape[0] // key.shape[0]
    outputs = []
    for group in groups:
        group.append(key, value)
        heads = slice(group.heads.start * group_size, group.heads.stop * group_size)
        kept = slice(0, group.length)
        outputs.append(slab_attention(query[heads], group.key[:, kept], group.value[:, kept], scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _PoolCache:
    """What transformers needs to believe that a cache is there; the KV itself is in the pool."""

    is_compileable = False

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0
