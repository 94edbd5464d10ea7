"""One decode step over a ragged batch: transformers' language model, our attention, our pool."""

from __future__ import annotations

from collections.abc import Sequence as Batch
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from decode_worker.kv_pool.base import KVPool
from decode_worker.sequence import Sequence
from shared.model.attention import LayerHook
from shared.model.sampler import Drawn


class DecodeEngine(Protocol):
    """What the step thread runs; holds nothing of a sequence between steps."""

    def step(self, batch: Batch[Sequence]) -> list[Drawn]:
        """Feeds every sequence its last token and draws the next one; the KV of the fed tokens is appended."""

    def replay(self, sequence: Sequence, number: int) -> None:
        """Feeds one sequence in one pass what the `number` steps would that make its next known tokens the last.

        Every token is computed as in a step of a batch, and nothing is drawn; the KV of the fed tokens is appended.
        The sequence has room for them, evicts nothing, and `number` is at most the largest batch.
        """


class EagerEngine:
    """Runs layer by layer as Python says: all that a CPU needs."""

    def __init__(self, model: PreTrainedModel, pool: KVPool[Any, Any]) -> None:
        self._model = model
        self._pool = pool

    @torch.inference_mode()
    def step(self, batch: Batch[Sequence]) -> list[Drawn]:
        """See `DecodeEngine`."""
        members = [sequence.kv for sequence in batch]
        logits = self._feed(batch, self._pool.attention(members))
        self._pool.complete(members)
        return draw(batch, logits, highest_tokens(logits))

    @torch.inference_mode()
    def replay(self, sequence: Sequence, number: int) -> None:
        """See `DecodeEngine`."""
        steps = sequence.steps_ahead(number)
        self._feed(steps, self._pool.replay([step.kv for step in steps]))
        sequence.kv.appended += number

    def _feed(self, batch: Batch[Sequence], attention: LayerHook) -> torch.Tensor:
        device = self._model.device
        tokens = torch.tensor([[sequence.last_token] for sequence in batch], device=device)
        positions = torch.tensor([[sequence.next_position] for sequence in batch], device=device)
        return forward(self._model, tokens, positions, attention)


def forward(
    model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor, attention: LayerHook
) -> torch.Tensor:
    """Logits after one token of every sequence, [batch, vocab]; tokens and positions are [batch, 1] int64."""
    output = model(
        input_ids=tokens, position_ids=positions, past_key_values=_PoolCache(), use_cache=True, vlc=attention
    )
    return output.logits[:, -1]


def highest_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Each row's highest entry, the first of equals; [batch, vocab] -> [batch] int64."""
    # five times faster on a CPU than argmax, which takes as long as several layers
    return logits.max(dim=-1).indices


def draw(batch: Batch[Sequence], logits: torch.Tensor, highest: torch.Tensor) -> list[Drawn]:
    """The next token of every sequence.

    Args:
        logits: [batch, vocab].
        highest: [batch] int64, as `highest_tokens` finds them.
    """
    drawn = [Drawn(token) for token in highest.tolist()]
    for row, sequence in enumerate(batch):
        if not sequence.sampler.takes_highest:
            # the drawn token will stand one position after the fed one
            drawn[row] = sequence.sampler.draw(logits[row].float().cpu(), sequence.next_position + 1)
    return drawn


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
