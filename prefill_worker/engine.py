"""The full-attention pass over one prompt. Runs in the model thread; knows nothing of requests or transport."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from prefill_worker.compression.policy import LayerStatistics, Policy
from prefill_worker.observer import PrefillObserver
from prefill_worker.prompt import Prompt
from shared.errors import RequestCancelledError


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """The outcome of one pass.

    Attributes:
        logits: [vocab] fp32, of the first generated token.
        keys: Per layer [num_kv_heads, num_tokens, head_dim], rotated.
        values: As `keys`.
        statistics: Per layer; empty when nothing was observed.
        seconds: Duration of the stages vision_encode, prefill and statistics.
    """

    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    statistics: list[LayerStatistics]
    seconds: dict[str, float]


class PrefillEngine:
    """Runs prompts one at a time: a CPU gains nothing from batching prefills, and nothing is padded."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    @torch.inference_mode()
    def prefill(self, prompt: Prompt, policy: Policy | None, cancelled: threading.Event) -> Prefilled:
        """One pass.

        Args:
            prompt: One unpadded prompt.
            policy: Says which rows to observe; None observes nothing (retention 1).
            cancelled: Checked at the start and before every layer.

        Raises:
            RequestCancelledError: `cancelled` was set.
        """
        if cancelled.is_set():
            # while it waited in the queue; the vision tower would run before the first layer looks
            raise RequestCancelledError("cancelled before it began")
        started = time.monotonic()
        rows = policy.rows(prompt.shape) if policy else range(0)
        observer = PrefillObserver(rows, policy.threshold if policy else 1.0, cancelled)
        # without a config: sliding layers, too, keep every token until the selection
        cache = DynamicCache()
        output = self._model(
            **self._on_device(prompt),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            vlc=observer,
        )
        return Prefilled(
            logits=output.logits[0, -1].float(),
            keys=[layer.keys[0] for layer in cache.layers],
            values=[layer.values[0] for layer in cache.layers],
            statistics=observer.statistics,
            seconds=_stage_seconds(started, observer),
        )

    def _on_device(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        device, dtype = self._model.device, self._model.dtype
        moved = {name: tensor.to(device) for name, tensor in prompt.inputs.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(dtype)
        return {**moved, "position_ids": prompt.position_ids.to(device)}


def _stage_seconds(started: float, observer: PrefillObserver) -> dict[str, float]:
    now = time.monotonic()
    first_layer = observer.first_layer_at or now
    return {
        "vision_encode": first_layer - started,
        "prefill": now - first_layer - observer.statistics_seconds,
        "statistics": observer.statistics_seconds,
    }
