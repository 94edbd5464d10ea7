"""Both halves of a worker in one process, over one copy of the weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from decode_worker.config import DecodeConfig
from decode_worker.engine import DecodeEngine, EagerEngine
from decode_worker.graph_engine import GraphEngine
from decode_worker.kv_pool.base import KVPool
from deploy.combined.config import CombinedConfig
from deploy.combined.worker import LoadedModel, load_model
from prefill_worker.compression.pipeline import sparse_prefill_for, statistics_for
from prefill_worker.compression.registry import build_policy
from prefill_worker.config import PrefillConfig
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.model.loading import load_decode_model
from shared.model.packing import PackedLinear
from shared.request.params import Budget
from tests.unit.decode_worker import tiny
from tests.unit.decode_worker.pools import CPU, block_pool, slab_pool
from tests.unit.decode_worker.sequences import LAYOUT, advance, pooled, prefill, sequence, some, text_ids
from tests.unit.prefill_worker.prompts import encoded, picture, user

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(CombinedConfig(model=str(checkpoint), dtype="float32"))


def test_every_half_gets_the_settings_of_its_role() -> None:
    config = CombinedConfig(
        model="m",
        served_model_name="toy",
        name="both",
        port=1,
        decode_port=2,
        decode_metrics_port=3,
        decode_advertise="node-1:0",
        threads=3,
        max_images=4,
        kv_memory_mib=5,
    )
    shared: dict[str, Any] = {"model": "m", "served_model_name": "toy", "threads": 3}
    assert config.prefill() == PrefillConfig(name="both-prefill", port=1, max_images=4, **shared)
    assert config.decode() == DecodeConfig(
        name="both-decode", port=2, metrics_port=3, advertise="node-1:0", kv_memory_mib=5, **shared
    )


@pytest.mark.parametrize("wrong", [{"kv_memory_mib": 0}, {"max_images": 0}, {"default_retention": 1.5}])
def test_a_bad_setting_of_either_half_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CombinedConfig(model="m", **wrong)


def test_there_is_one_copy_of_the_weights(loaded: LoadedModel) -> None:
    whole = {name: weight.data_ptr() for name, weight in loaded.prefill.engine._model.named_parameters()}
    decode = {name: weight.data_ptr() for name, weight in loaded.decode.model.named_parameters()}
    assert len(whole) > 20
    assert decode == whole


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 arithmetic")
def test_linear_layers_are_packed_once_for_both(checkpoint: Path) -> None:
    loaded = load_model(CombinedConfig(model=str(checkpoint), dtype="bfloat16"))
    assert loaded.prefill.engine._model is loaded.decode.model
    kinds = {type(module) for module in loaded.decode.model.modules()}
    assert PackedLinear in kinds
    assert torch.nn.Linear not in kinds


def eager(model: Any) -> tuple[KVPool[Any, Any], DecodeEngine]:
    pool = slab_pool(LAYOUT)
    return pool, EagerEngine(model, pool)


def graphs(model: Any) -> tuple[KVPool[Any, Any], DecodeEngine]:
    pool = block_pool(LAYOUT)
    return pool, GraphEngine(model, pool, max_num_seqs=4)


def generated(pool: KVPool[Any, Any], engine: DecodeEngine, checkpoint: Path) -> list[list[int]]:
    """Tokens of three sequences that are stepped together."""
    whole = tiny.load_whole(checkpoint)
    prompts = [prefill(whole, text_ids(seed, 20 + seed)) for seed in range(3)]
    batch = [
        sequence(prompt, pooled(pool, prompt, some(seed, prompt.num_tokens), STEPS), STEPS)
        for seed, prompt in enumerate(prompts)
    ]
    steps = []
    for _ in range(STEPS):
        steps.append(engine.step(batch))
        advance(batch, steps[-1])
    return steps


@pytest.mark.parametrize("build", [eager, graphs])
def test_steps_over_the_whole_model_are_those_over_its_language_model(
    loaded: LoadedModel, checkpoint: Path, build: Any
) -> None:
    language = load_decode_model(checkpoint, dtype=torch.float32, device=CPU)
    expected = generated(*build(language), checkpoint)
    assert generated(*build(loaded.decode.model), checkpoint) == expected


@pytest.mark.parametrize("policy", ["vl_cache", "fast_v", "zip_vl"])
def test_prefill_and_steps_at_the_same_time_do_not_disturb_each_other(
    loaded: LoadedModel, checkpoint: Path, policy: str
) -> None:
    builder = PromptBuilder(loaded.prefill.processor, loaded.prefill.spec, max_images=2)
    prompts = [builder.build([user(encoded(picture(seed)), "what?" * seed)], max_new_tokens=4) for seed in range(1, 4)]
    alone = [prefilled(loaded, prompt, policy) for prompt in prompts]
    expected = generated(*eager(loaded.decode.model), checkpoint)
    together: list[list[torch.Tensor]] = []
    over = threading.Event()

    def prefill_again_and_again() -> None:
        while not (over.is_set() and together):
            together.extend(prefilled(loaded, prompt, policy) for prompt in prompts)

    thread = threading.Thread(target=prefill_again_and_again)
    thread.start()
    try:
        for _ in range(5):
            assert generated(*eager(loaded.decode.model), checkpoint) == expected
    finally:
        over.set()
        thread.join()
    for number, found in enumerate(together):
        for tensor, reference in zip(found, alone[number % len(prompts)], strict=True):
            assert torch.equal(tensor, reference)


def prefilled(loaded: LoadedModel, prompt: Prompt, name: str) -> list[torch.Tensor]:
    """Logits, keys, and values of one pass that observes attention, or changes it."""
    policy, shape = build_policy(name, {}), prompt.shape
    sparse = sparse_prefill_for(policy, shape, Budget(retention=0.7), loaded.prefill.spec.layout.num_layers)
    found = loaded.prefill.engine.prefill(prompt, statistics_for(policy, shape), threading.Event(), sparse)
    return [found.logits, *found.keys, *found.values]
