"""At retention 1 a decode worker's tokens are those of transformers' `generate`, whatever shares the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from decode_worker.engine import DecodeEngine, EagerEngine
from decode_worker.graph_engine import GraphEngine
from shared.kv.layout import KVLayout
from shared.model.loading import load_decode_model, load_spec
from tests.families.decoding import Computed, compute, pooled, short_text
from tests.families.loaded import Loaded, noise
from tests.unit.decode_worker.pools import CPU, Pool, block_pool, poison, slab_pool
from tests.unit.decode_worker.sequences import advance
from tests.unit.decode_worker.sighted import some_seen

# Longer than Gemma 3's window, so that a prompt of 5 tokens leaves it, too.
STEPS = 24
CAPACITY, MAX_BATCH = 4 << 20, 6


def prompts(loaded: Loaded) -> dict[str, dict[str, Any]]:
    return {
        "an image": loaded.chat([noise(28, 28)]),
        "few tokens": short_text(loaded, 5),
        "a wide image": loaded.chat([noise(112, 56, seed=1)]),
        "text": loaded.chat(),
        "two images": loaded.chat([noise(56, 84, seed=2), noise(28, 40, seed=3)]),
    }


class Asked:
    """A family's prompts, computed by transformers, and its answers to them."""

    def __init__(self, loaded: Loaded) -> None:
        self.computed: dict[str, Computed] = {}
        self.answers: dict[str, list[int]] = {}
        for name, inputs in prompts(loaded).items():
            made = loaded.model.generate(**inputs, max_new_tokens=STEPS + 1)
            self.answers[name] = made[0, inputs["input_ids"].shape[1] :].tolist()
            self.computed[name] = compute(loaded.model, inputs)


@pytest.fixture(scope="module")
def asked(loaded: Loaded) -> Asked:
    settings = loaded.model.generation_config
    end, settings.eos_token_id = settings.eos_token_id, None
    yield Asked(loaded)
    settings.eos_token_id = end


@pytest.fixture(scope="module")
def layout(loaded: Loaded) -> KVLayout:
    return load_spec(loaded.folder, torch.float32).layout


@pytest.fixture(scope="module")
def model(loaded: Loaded) -> Any:
    return load_decode_model(loaded.folder, dtype=torch.float32, device=CPU)


def eager(model: Any, layout: KVLayout) -> tuple[Pool, DecodeEngine]:
    pool = slab_pool(layout, CAPACITY)
    return pool, EagerEngine(model, pool)


def captured(model: Any, layout: KVLayout) -> tuple[Pool, DecodeEngine]:
    pool = block_pool(layout, CAPACITY, max_num_seqs=MAX_BATCH, max_tokens=1024)
    return pool, GraphEngine(model, pool, max_num_seqs=MAX_BATCH)


@pytest.mark.parametrize("build", [eager, captured])
def test_a_batch_of_all_kinds_of_prompts_gives_the_tokens_of_generate(
    build: Callable[..., tuple[Pool, DecodeEngine]], model: Any, layout: KVLayout, asked: Asked
) -> None:
    pool, engine = build(model, layout)
    poison(pool)
    batch = [
        pooled(pool, computed, some_seen(layout, computed.num_tokens, 0, every=True), STEPS)
        for computed in asked.computed.values()
    ]
    found = [[each.last_token] for each in batch]
    for _ in range(STEPS):
        advance(batch, engine.step(batch))
        for tokens, each in zip(found, batch, strict=True):
            tokens.append(each.last_token)
    assert dict(zip(asked.answers, found, strict=True)) == asked.answers
    assert all(len(set(tokens)) > 2 for tokens in found), "answers that say something"


def test_what_a_lost_worker_had_generated_is_replayed(model: Any, layout: KVLayout, asked: Asked) -> None:
    """One pass over many known tokens, across the window's end, then steps."""
    for name in ("an image", "few tokens"):
        pool, engine = captured(model, layout)
        computed, answer = asked.computed[name], asked.answers[name]
        each = pooled(pool, computed, some_seen(layout, computed.num_tokens, 0, every=True), STEPS)
        known = answer[1 : STEPS - 3]
        each.known.extend(known)
        for first in range(0, len(known), MAX_BATCH):
            number = min(MAX_BATCH, len(known) - first)
            engine.replay(each, number)
            for _ in range(number):
                each.recall()
        found = []
        for _ in range(4):
            advance([each], engine.step([each]))
            found.append(each.last_token)
        assert found == answer[STEPS - 3 :]


def test_a_text_request_after_one_with_an_image_is_answered_as_alone(
    model: Any, layout: KVLayout, asked: Asked
) -> None:
    """Nothing of the last request stays on the model: some families keep the offset of its positions there."""
    pool, engine = eager(model, layout)
    for name in ("two images", "text", "an image", "few tokens"):
        computed = asked.computed[name]
        each = pooled(pool, computed, some_seen(layout, computed.num_tokens, 0, every=True), STEPS)
        found = [each.last_token]
        for _ in range(8):
            advance([each], engine.step([each]))
            found.append(each.last_token)
        assert found == asked.answers[name][:9], name
