"""A pass over the text behind a prefix whose KV is there already: all of it, or what a policy kept of it."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.second_question.prefix import Prefix
from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rotation import Rotation
from prefill_worker.compression.statistics import Statistic
from prefill_worker.config import PrefillConfig
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.engine.observer import PrefillObserver
from prefill_worker.prompt import Prompt
from shared.model.checkpoint import open_checkpoint
from shared.model.loading import load_prefill_model

Seen = Sequence[torch.Tensor]
"""Per layer [num_kv_heads, prefix tokens] bool: whose KV is there."""


@dataclass(eq=False, kw_only=True)
class PartialAttention(LayerAttention):
    """`seen`: [num_kv_heads, num_tokens] bool, the keys that the layer's queries may look at."""

    seen: torch.Tensor


@dataclass(frozen=True)
class SeenKeys(Statistic[torch.Tensor]):
    """`PartialAttention.seen`; of a text pass alone."""

    def measure(self, layer: LayerAttention) -> torch.Tensor:
        """See the class."""
        assert isinstance(layer, PartialAttention), "a whole pass sees everything"
        return layer.seen


class TextObserver(PrefillObserver):
    """The observer of a pass over the text behind `prefix`; policies see the whole prompt's queries and keys.

    Args:
        seen: What the text may look at; the rest is masked, as if its KV were gone.
    """

    def __init__(
        self,
        prompt: PromptShape,
        statistics: Collection[Statistic[Any]],
        rotations: Sequence[Rotation],
        prefix: Prefix,
        seen: Seen,
    ) -> None:
        super().__init__(prompt, statistics, threading.Event(), rotations)
        text = prompt.num_tokens - prefix.num_tokens
        self._queries = prefix.queries
        self._seen = [torch.nn.functional.pad(each, (0, text), value=True) for each in seen]

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
        if not bool(self._seen[layer].all()):
            assert mask is not None, "text of one token"
            by_query_head = self._seen[layer].repeat_interleave(query.shape[1] // key.shape[1], dim=0)
            mask = mask & by_query_head[None, :, None]
        return super().attend(layer, query, key, value, mask, scaling)

    def _layer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None = None,
    ) -> LayerAttention:
        layer = len(self.measured)
        return PartialAttention(
            prompt=self._prompt,
            query=torch.cat((self._queries[layer], query), dim=1),
            key=key,
            value=value,
            scaling=scaling,
            rotation=self._rotations[layer],
            seen=self._seen[layer],
        )


class TextEngine(PrefillEngine):
    """A prefill engine that also runs prompts whose images have passed before."""

    @torch.inference_mode()
    def prefill_text(
        self, prompt: Prompt, prefix: Prefix, statistics: Collection[Statistic[Any]], seen: Seen | None = None
    ) -> Prefilled:
        """One pass over the text alone.

        Args:
            prefix: Of a prompt that begins like this one.
            seen: What is left of the prefix; None is all of it.

        Returns:
            The whole prompt's keys and values, those that are not left included.
        """
        if seen is None:
            seen = [torch.ones(key.shape[:2], dtype=torch.bool, device=key.device) for key in prefix.keys]
        observer = TextObserver(prompt.shape, statistics, self._kinds.rotations(prompt), prefix, seen)
        cache, text = prefix.cache(), slice(prefix.num_tokens, None)
        output = self._model(
            input_ids=prompt.inputs["input_ids"][:, text].to(self.device),
            position_ids=prompt.position_ids[:, text].to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            vlc=observer,
        )
        return Prefilled(
            logits=output.logits[0, -1].float(),
            keys=[layer.keys[0] for layer in cache.layers],
            values=[layer.values[0] for layer in cache.layers],
            measured=observer.measured,
            seconds={},
        )


def load_engine(config: PrefillConfig) -> TextEngine:
    """The engine of a checkpoint, as a prefill worker loads it."""
    checkpoint = open_checkpoint(config)
    return TextEngine(load_prefill_model(checkpoint.path, dtype=checkpoint.dtype, device=checkpoint.device))
