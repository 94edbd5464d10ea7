"""The KV that a pass holds. The model reads a layer's KV in that layer alone; afterwards it is only kept to be sent."""

from __future__ import annotations

from typing import Any

import torch

from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.statistics import ObservedLayer
from prefill_worker.engine.prefix import Prefix
from prefill_worker.parcel.early_rows import EarlyRows

# A layer is cut down again where at most this share of what it holds stays: fewer cuts for a little more memory.
WORTHWHILE = 0.9


class PromptCache:
    """Owner of the KV of one pass; in the model thread.

    Args:
        cascade: Says which tokens of the layers that have attended may go; None keeps all of them.
        prefix: What the prompt begins with and need not pass; it stays as it is.
        rest: Tokens of the prompt that pass after its first piece; 0 where it passes at once.
        kept_tokens: So many of the first tokens are copied for later prompts.
        early: Takes rows that the cascade will keep for certain; None where nothing leaves before the end.

    Attributes:
        keys: Per layer [num_kv_heads, num_tokens, head_dim]; after a cascade [rows, head_dim], head after head.
        values: As `keys`.
        held: After a cascade, per layer which tokens the rows are, [num_kv_heads, num_tokens] bool; else empty.
        peak_bytes: Most KV that was there at once.
        begins: The copy of the first tokens; without layers where none are kept.
    """

    def __init__(
        self,
        cascade: Cascade | None = None,
        prefix: Prefix | None = None,
        *,
        rest: int = 0,
        kept_tokens: int = 0,
        early: EarlyRows | None = None,
    ) -> None:
        self._cascade = cascade
        self._prefix = prefix
        self._rest = rest
        self._kept_tokens = kept_tokens
        self._early = early
        self._bounds: list[int] = []
        self._filled: list[int] = []
        self._held_bytes = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.held: list[torch.Tensor] = []
        self.peak_bytes = 0
        self.begins = Prefix(keys=[], values=[])

    def passed(self, layer: ObservedLayer) -> None:
        """The last layer has attended: it and those before lose what cannot be kept any more."""
        assert self._cascade is not None, "nothing may go"
        self._cascade.add(layer)
        self.held.append(torch.ones(layer.key.shape[:2], dtype=torch.bool, device=layer.key.device))
        self._bounds.append(layer.prompt.num_tokens)
        # the layer that is whole comes last, when the others have made room
        for index, bound in enumerate(self._cascade.bounds()):
            if bound <= WORTHWHILE * self._bounds[index]:
                self._truncate(index, self._cascade.best(index, bound))
                self._bounds[index] = bound
        if self._early is not None:
            self._early.passed(self.keys, self.values, self.held)

    def check_integrity(self) -> None:
        """Asserts that the count of bytes is that of the tensors."""
        assert self._held_bytes == sum(tensor.nbytes for tensor in (*self.keys, *self.values))
        assert self._held_bytes <= self.peak_bytes
        for key, held in zip(self.keys, self.held, strict=bool(self.held)):
            assert key.shape[:-1].numel() == int(held.sum()), "a row has no token, or a token no row"

    def _truncate(self, index: int, candidates: torch.Tensor) -> None:
        stay = candidates[self.held[index]].nonzero().flatten()
        self.held[index] = candidates
        for tensors in (self.keys, self.values):
            rows = tensors[index].view(-1, tensors[index].shape[-1]).index_select(0, stay)
            self._add(rows)
            self._held_bytes -= tensors[index].nbytes
            tensors[index] = rows

    def _add(self, rows: torch.Tensor) -> None:
        self._held_bytes += rows.nbytes
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)

    # What transformers asks of a cache.

    is_compileable = False

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the KV of a layer's tokens that pass, [1, num_kv_heads, num_tokens, head_dim]; returns all so far."""
        assert layer_idx <= len(self.keys), "layers pass in their order"
        if layer_idx == len(self.keys):
            self._begin(key, value)
        first, end = self._filled[layer_idx], self._filled[layer_idx] + key.shape[2]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, first:end], values[:, first:end] = key[0], value[0]
        self._filled[layer_idx] = end
        if self._kept_tokens and end == keys.shape[1]:
            self.begins.keys.append(keys[:, : self._kept_tokens].clone())
            self.begins.values.append(values[:, : self._kept_tokens].clone())
        return keys[None, :, :end], values[None, :, :end]

    def _begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """The next layer, of which the prompt's first piece has come; it gets room for all of them."""
        known = self._prefix.num_tokens if self._prefix else 0
        for tensors, rows in ((self.keys, key), (self.values, value)):
            heads, tokens, head_dim = rows.shape[1:]
            tensors.append(rows.new_empty(heads, known + tokens + self._rest, head_dim))
            self._add(tensors[-1])
        if self._prefix is not None:
            layer = len(self.keys) - 1
            self.keys[layer][:, :known] = self._prefix.keys[layer]
            self.values[layer][:, :known] = self._prefix.values[layer]
        self._filled.append(known)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those that pass."""
        if layer_idx < len(self._filled):
            return self._filled[layer_idx]
        return self._prefix.num_tokens if self._prefix else 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_seq_length`."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys, and the first of them."""
        return self.get_seq_length(layer_idx) + query_length, 0
