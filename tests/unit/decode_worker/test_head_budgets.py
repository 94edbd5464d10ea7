"""KV heads that keep different counts, all the way: policy, parcel, manifest, reservation, pool, attention."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_worker.engine import EagerEngine
from prefill_worker.compression.pipeline import select_tokens, statistics_for
from prefill_worker.compression.policies.ada_kv import AdaKV
from prefill_worker.compression.policies.fast_gen import FastGen
from prefill_worker.compression.policy import Policy
from prefill_worker.compute import PrefillCompute
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.job import PrefillJob
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.model.loading import load_decode_model, load_prefill_model, load_spec
from shared.model.processor import load_processor
from shared.request.params import Budget
from shared.request.sampling import Sampling
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.pools import CPU, POOLS, poison
from tests.unit.decode_worker.sequences import LAYOUT, Kept, advance, prefill, sequence
from tests.unit.decode_worker.test_engine import Recorded, masked_step
from tests.unit.decode_worker.tiny import KV_HEADS, LAYERS, load_whole, tokenizer
from tests.unit.prefill_worker.compression.observing import positions
from tests.unit.prefill_worker.pieces import job as plain_job
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, user

STEPS = 6


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    """The whole model in double precision, which masks what was evicted."""
    return load_whole(checkpoint, torch.float64, {"text_config": "masked_oracle", "vision_config": "eager"})


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(load_processor(checkpoint), load_spec(checkpoint, torch.float32), max_images=1)


@pytest.fixture(scope="module")
def prompt(builder: PromptBuilder) -> Prompt:
    return builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=STEPS + 1)


@pytest.fixture(scope="module")
def prefiller(checkpoint: Path) -> PrefillEngine:
    return PrefillEngine(load_prefill_model(checkpoint, dtype=torch.float32, device=CPU))


@pytest.fixture(scope="module")
def compute(prefiller: PrefillEngine, builder: PromptBuilder, checkpoint: Path) -> PrefillCompute:
    identity = ModelIdentity.of("tiny", checkpoint, builder._spec)
    return PrefillCompute(prefiller, tokenizer(), builder._spec, identity, PrefillMetrics(worker="p", model="tiny"))


def work_of(policy: Policy, budget: Budget) -> PrefillJob:
    sampling = Sampling(max_new_tokens=STEPS + 1, ignore_eos=True)
    return dataclasses.replace(plain_job(), sampling=sampling, budget=budget, policy=policy)


def parcel(compute: PrefillCompute, work: PrefillJob, prompt: Prompt, bound: int) -> tuple[Manifest, memoryview]:
    """In an arena slot of the bound's size; the manifest as the wire brings it."""
    body = memoryview(bytearray(LAYOUT.full_bytes(bound)))
    complete = compute.run(work, prompt, body, lambda _: None)
    assert complete is not None
    manifest = Manifest.from_proto(complete().to_proto())
    return manifest, body[: manifest.body_bytes]


def chosen_by(engine: PrefillEngine, work: PrefillJob, prompt: Prompt) -> Kept:
    prefilled = engine.prefill(prompt, statistics_for(work.policy, prompt.shape), threading.Event())
    return [positions(kept) for kept in select_tokens(work.policy, prefilled.observed(prompt.shape), work.budget)]


@pytest.mark.parametrize("storage", ["slabs", "blocks of 16", "blocks of 3"])
@pytest.mark.parametrize(
    "policy", [AdaKV(window=4, floor_share=0.1), FastGen(mass=0.7)], ids=lambda policy: str(policy.name)
)
def test_ragged_heads_decode_like_a_full_cache_with_the_dropped_masked(
    oracle: Any,
    checkpoint: Path,
    prefiller: PrefillEngine,
    compute: PrefillCompute,
    prompt: Prompt,
    policy: Policy,
    storage: str,
) -> None:
    work = work_of(policy, Budget(retention=0.5))
    kept = chosen_by(prefiller, work, prompt)
    counts = [[len(head) for head in layer] for layer in kept]
    assert any(len(set(layer)) == KV_HEADS for layer in counts), "heads that differ"

    bound = work.budget.kept_tokens_bound(prompt.shape.num_tokens - prompt.shape.num_visual, prompt.shape.num_visual)
    manifest, body = parcel(compute, work, prompt, bound)
    assert manifest.num_kept == tuple(count for layer in counts for count in layer)

    pool = POOLS[storage](LAYOUT, 1 << 20)
    poison(pool)
    allocation = pool.allocate(pool.bound_bytes(bound, STEPS))
    allocation = pool.shrink(allocation, pool.sequence_bytes(manifest.num_kept, STEPS))
    kv = pool.install(allocation, manifest.num_kept, body, STEPS)
    assert tuple(kv.lengths.ravel()) == manifest.num_kept

    whole = prefill(oracle, prompt.inputs["input_ids"][0].tolist(), pixel_values=prompt.inputs["pixel_values"].double())
    each = sequence(whole, kv, STEPS)
    assert each.last_token == manifest.generated[-1]
    model = Recorded(load_decode_model(checkpoint, dtype=torch.float32, device=CPU))
    engine = EagerEngine(model, pool)
    for step in range(STEPS):
        token = each.last_token
        advance([each], engine.step([each]))
        expected = masked_step(oracle, whole, kept, token, prompt.next_position + step)
        error = (model.logits[0].double() - expected).abs().max() / expected.abs().max()
        assert error < 2e-5


@pytest.mark.parametrize("retention", [0.05, 0.3, 0.5, 0.9])
def test_a_reservation_covers_ragged_heads(prefiller: PrefillEngine, prompt: Prompt, retention: float) -> None:
    """Blocks begin per head: many short heads and a long one take more of them than heads of their mean."""
    budget, num_tokens = Budget(retention=retention), prompt.shape.num_tokens
    bound = budget.kept_tokens_bound(0, num_tokens)
    for policy in (AdaKV(window=1, floor_share=0.0), FastGen(mass=0.3)):
        kept = chosen_by(prefiller, work_of(policy, budget), prompt)
        counts = tuple(len(head) for layer in kept for head in layer)
        assert len(counts) == LAYERS * KV_HEADS
        for make in POOLS.values():
            pool = make(LAYOUT, 1 << 20)
            assert pool.sequence_bytes(counts, STEPS) <= pool.bound_bytes(bound, STEPS)
