"""The attention of the prefill pass: plain SDPA, after the statistics that the policy asked for were measured."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rotation import Rotation
from prefill_worker.compression.statistics import ObservedLayer, Statistic, measure_all
from prefill_worker.engine.held_rows import HeldRows
from shared.errors import RequestCancelledError

# Queries that attend at once where there is a mask: PyTorch's CPU kernel makes numbers of its booleans.
MASKED_ROWS = 512


class PrefillObserver:
    """The `LayerHook` of one prefill, whose prompt passes at once or in pieces.

    Cancellation is checked before every layer, so a departed client costs at most one layer of compute.

    Args:
        prompt: The prompt that passes.
        statistics: What is measured in each layer; none observes nothing.
        cancelled: Set from another thread to stop the pass.
        rotations: How each layer rotates this prompt's queries and keys.
        causal: Whether the model's attention is plainly causal, so that a mask says no more than that.

    Attributes:
        measured: Per layer that has passed, each statistic's value.
        seconds: Time that measuring took.
        first_layer_at: When the vision tower was done; None before.
        survivors: None: every token reaches the last layer.
        lenders: Empty: every layer attends to keys of its own.
    """

    def __init__(
        self,
        prompt: PromptShape,
        statistics: Collection[Statistic[Any]],
        cancelled: threading.Event,
        rotations: Sequence[Rotation],
        *,
        causal: bool = True,
    ) -> None:
        self._prompt = prompt
        self._statistics = statistics
        self._cancelled = cancelled
        self._rotations = rotations
        self._causal = causal
        self._held = HeldRows(min((each.first_row(prompt) for each in statistics), default=prompt.num_tokens))
        self.measured: list[dict[Statistic[Any], Any]] = []
        self.seconds = 0.0
        self.first_layer_at: float | None = None
        self.survivors: torch.Tensor | None = None
        self.lenders: dict[int, int] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; batch is 1."""
        self._begin(layer)
        if self._statistics:
            said = None if mask is None or self._causal else mask[0, 0]
            self._observe(layer, query[0], key[0], value[0], scaling, said)
        if mask is None:
            return _attended(query, key, value, None, scaling).transpose(1, 2)
        rows = zip(query.split(MASKED_ROWS, dim=2), mask.split(MASKED_ROWS, dim=2), strict=True)
        output = torch.cat([_attended(some, key, value, seen, scaling) for some, seen in rows], dim=2)
        return output.transpose(1, 2)

    def _observe(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None,
    ) -> None:
        """Measures when all keys are there; `mask` as in `_layer`."""
        end = key.shape[1]
        if end < self._prompt.num_tokens:
            self._held.hold(layer, query, mask, end)
            return
        query, mask = self._held.join(layer, query, mask, end)
        self._measure(self._layer(query, key, value, scaling, mask))

    def _begin(self, layer: int) -> None:
        if self._cancelled.is_set():
            raise RequestCancelledError(f"cancelled before layer {layer}")
        if self.first_layer_at is None:
            self.first_layer_at = time.monotonic()

    def _layer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None = None,
    ) -> LayerAttention:
        """What is measured on; `mask` [num_queries, num_keys] bool says who sees whom, None is plain causal."""
        missing = key.shape[1] - query.shape[1]
        if missing:
            # never passed, or not held: whoever looked at them would get no number at all
            query = torch.nn.functional.pad(query, (0, 0, missing, 0), value=torch.nan)
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 0, missing, 0), value=True)
        return LayerAttention(
            prompt=self._prompt,
            query=query,
            key=key,
            value=value,
            scaling=scaling,
            rotation=self._rotations[len(self.measured)],
            mask=mask,
        )

    def _measure(self, layer: LayerAttention) -> None:
        started = time.monotonic()
        self.measured.append(measure_all(self._statistics, layer))
        self.seconds += time.monotonic() - started


class CascadeObserver(PrefillObserver):
    """The observer of a pass whose layers are handed over when they have attended.

    Args:
        passed: Called after each layer, with all of its KV.

    Attributes:
        seconds_after: Time that this took.
    """

    def __init__(
        self,
        prompt: PromptShape,
        statistics: Collection[Statistic[Any]],
        cancelled: threading.Event,
        rotations: Sequence[Rotation],
        passed: Callable[[ObservedLayer], None],
        *,
        causal: bool = True,
    ) -> None:
        super().__init__(prompt, statistics, cancelled, rotations, causal=causal)
        self._passed = passed
        self.seconds_after = 0.0

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """See `LayerHook.attend`; batch is 1."""
        output = super().attend(layer, query, key, value, mask, scaling)
        started = time.monotonic()
        self._passed(ObservedLayer(prompt=self._prompt, key=key[0], value=value[0], measured=self.measured[-1]))
        self.seconds_after += time.monotonic() - started
        return output


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
