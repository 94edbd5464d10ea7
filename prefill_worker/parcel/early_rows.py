"""Rows of a cascading pass leave when it is certain that they are kept, while later layers are still computed.

They leave in waves: whenever enough has become certain, whatever of the layers so far has not left yet. In the model
thread rows are gathered, no more; what is sent, and when, is for whoever takes the waves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.pipeline import Selection
from prefill_worker.parcel.host_rows import Arrival, LayerRows, copy_rows, write_where_kv_lies
from shared.kv.transport.base import Parcel
from shared.kv.waves import LAST_WAVE
from shared.model.wave_order import last_wave

# A wave costs a message: below this it gains nothing.
MIN_WAVE_BYTES = 1 << 16
# It costs a selection in each layer that has rows in it: a layer waits while more than this share of them has left.
WORTHWHILE = 0.9


class Early(Protocol):
    """Called in the model thread, sends in another."""

    def add(self, piece: Callable[[], memoryview]) -> None:
        """Takes the next wave, whose bytes are there when `piece` returns them; that may take a while."""

    def placed(self, waves: bytes) -> None:
        """Takes the wave of each kept row, as the K rows of the body lie; only after some wave."""


class EarlyRows:
    """What has left of one pass. In the model thread.

    Args:
        cascade: That of the pass.
        early: Takes the waves.
    """

    def __init__(self, cascade: Cascade, early: Early) -> None:
        self._cascade = cascade
        self._early = early
        self._left: list[int] = []
        self._next_wave = 0
        # per layer the wave in which each token left, [num_kv_heads, num_tokens] uint8
        self._waves: list[torch.Tensor] = []

    def passed(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], held: Sequence[torch.Tensor]
    ) -> None:
        """Another layer has attended; what is left of it and of those before is as in `PromptCache`."""
        self._waves.append(torch.full_like(held[-1], LAST_WAVE, dtype=torch.uint8))
        self._left.append(0)
        if self._cascade.complete or self._next_wave == LAST_WAVE:
            return  # the rest goes together
        certain = self._cascade.certain()
        grown = [index for index, tokens in enumerate(certain) if tokens and self._left[index] <= WORTHWHILE * tokens]
        tokens = sum(certain[index] - self._left[index] for index in grown)
        nbytes = 2 * tokens * len(held[0]) * keys[0].shape[-1] * keys[0].element_size()
        if nbytes >= MIN_WAVE_BYTES:
            rows = [self._take(index, certain[index], held[index]) for index in grown]
            self._ship([(keys[index], values[index], taken) for index, taken in zip(grown, rows, strict=True)])

    def placed(self, selections: Sequence[Selection]) -> None:
        """The pass is over, and this is kept of its layers."""
        if self._next_wave == 0:
            return
        kept = []
        for waves, selection in zip(self._waves, selections, strict=True):
            assert selection.chosen is not None, "a budget below 1 chooses"
            assert bool((waves[~selection.chosen] == LAST_WAVE).all()), "a row has left that is not kept"
            kept.append(waves[selection.chosen])
        self._early.placed(torch.cat(kept).cpu().numpy().tobytes())

    def _take(self, index: int, certain: int, held: torch.Tensor) -> torch.Tensor:
        """Rows of a layer, among those held, that leave with the next wave."""
        leaving = self._cascade.best(index, certain) & (self._waves[index] == LAST_WAVE)
        self._waves[index][leaving] = self._next_wave
        self._left[index] = certain
        return leaving[held].nonzero().flatten()

    def _ship(self, layers: list[LayerRows]) -> None:
        key, _, _ = layers[0]
        num_rows = 2 * sum(len(rows) for _, _, rows in layers)
        on_gpu = key.device.type == "cuda"
        target = torch.empty(num_rows, key.shape[-1], dtype=key.dtype, pin_memory=on_gpu)
        arrival = write_where_kv_lies(partial(copy_rows, layers), target, key.device)
        self._early.add(partial(_arrived, arrival, target))
        self._next_wave += 1


def rest_of(parcel: Parcel, waves: bytes) -> list[Callable[[], memoryview]]:
    """What follows the waves of the pass: its other rows, the scores, and when each row has left."""
    manifest = parcel.manifest
    rows = partial(last_wave, parcel.body, manifest.layout, manifest.num_kept, waves)
    return [rows, lambda: parcel.body[manifest.kv_bytes :], lambda: memoryview(waves)]


def _arrived(arrival: Arrival, rows: torch.Tensor) -> memoryview:
    arrival()
    return rows.view(torch.uint8).numpy().reshape(-1).data
