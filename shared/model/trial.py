"""One token through a loaded model, at the start: what no configuration tells shows before anything is served.

It also reads all weights once, so that the first request does not wait for their pages.
"""

from __future__ import annotations

import logging
import time

import torch
from transformers import PreTrainedModel

from shared.kv.layout import KVLayout
from shared.model.support import UnsupportedModelError

log = logging.getLogger(__name__)


@torch.inference_mode()
def try_out(model: PreTrainedModel, layout: KVLayout) -> None:
    """Feeds the first token of the vocabulary.

    Args:
        layout: What the configuration promises of K and V; its dtype does not matter.

    Raises:
        UnsupportedModelError: The model's attention is none that we compute, or its KV has another shape.
    """
    started, hook = time.monotonic(), _Witness()
    start = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        model(input_ids=start, position_ids=start, use_cache=False, vlc=hook)
    except NotImplementedError as error:
        raise UnsupportedModelError(f"{model.config.model_type} cannot be served: {error}") from error
    expected = [(layer, (1, layout.num_kv_heads, 1, layout.head_dim)) for layer in range(layout.num_layers)]
    if hook.seen != expected:
        raise UnsupportedModelError(
            f"{model.config.model_type} cannot be served: its layers attend as {hook.seen[:3]}.. and not as "
            f"{expected[:3]}.., so its state would have to be shipped otherwise"
        )
    log.info("a first token took %.1f s", time.monotonic() - started)


class _Witness:
    """A `LayerHook` that notes the layers and the shapes of their K; one token attends to itself alone."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        self.seen.append((layer, tuple(key.shape)))
        if value.shape != key.shape:
            raise NotImplementedError("attention with K and V of other widths is not supported")
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)
