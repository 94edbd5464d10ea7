"""The prefill half of the service over a checkpoint of a family."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache

from prefill_worker.compression.statistics import Statistic
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.model.identity import ModelIdentity
from shared.model.loading import load_prefill_model, load_spec
from shared.telemetry.metrics import PrefillMetrics
from tests.families.chats import Chat, inputs_of, messages
from tests.families.loaded import Loaded

CPU = torch.device("cpu")
MAX_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What transformers makes of a prompt; keys and values per layer, [num_kv_heads, num_tokens, head_dim]."""

    input_ids: torch.Tensor
    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


class Prefilling:
    """`engine` keeps nothing from prompt to prompt; `keeping` makes one that does, `cutting` one of pieces."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.spec = load_spec(loaded.folder, torch.float32)
        self.builder = PromptBuilder(loaded.processor, self.spec, max_images=MAX_IMAGES)
        self.model = load_prefill_model(loaded.folder, dtype=torch.float32, device=CPU)
        self.engine = PrefillEngine(self.model)

    def keeping(self) -> PrefillEngine:
        return PrefillEngine(self.model, vision_cache_bytes=1 << 22, prefix_cache_bytes=1 << 22)

    @cached_property
    def compute(self) -> PrefillCompute:
        identity = ModelIdentity.of("tiny", self.loaded.folder, self.spec)
        tokenizer = self.loaded.processor.tokenizer
        return PrefillCompute(self.engine, tokenizer, self.spec, identity, PrefillMetrics(worker="p", model="tiny"))

    def cutting(self, chunk_tokens: int) -> PrefillEngine:
        return PrefillEngine(self.model, prefix_cache_bytes=1 << 22, chunk_tokens=chunk_tokens)

    def prompt(self, chat: Chat, max_new_tokens: int = 1) -> Prompt:
        return self.builder.build(messages(chat), max_new_tokens=max_new_tokens)

    def run(self, chat: Chat, statistics: Collection[Statistic[Any]] = ()) -> Prefilled:
        return self.engine.prefill(self.prompt(chat), statistics, threading.Event())

    @torch.inference_mode()
    def expected(self, chat: Chat) -> Expected:
        cache, inputs = DynamicCache(), inputs_of(self.loaded, chat)
        output = self.loaded.model(**inputs, past_key_values=cache, use_cache=True)
        return Expected(
            input_ids=inputs["input_ids"][0],
            logits=output.logits[0, -1],
            keys=[layer.keys[0] for layer in cache.layers],
            values=[layer.values[0] for layer in cache.layers],
        )


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """By the largest of the numbers."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
