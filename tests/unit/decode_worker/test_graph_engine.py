"""Steps by captured batch size: three engines that agree, padding that nobody notices, a step that asks nothing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaForConditionalGeneration

from decode_worker.engine import DecodeEngine, EagerEngine
from decode_worker.graph_engine import GraphEngine, batch_sizes
from decode_worker.kv_pool.blocks import TRASH_BLOCK
from decode_worker.sequence import Sequence
from shared.kernels.dispatch import REFERENCE
from shared.model.attention import DECODE_ATTENTION
from shared.model.loading import load_decode_model
from tests.unit.decode_worker import tiny
from tests.unit.decode_worker.pools import CPU, Pool, block_pool, poison, slab_pool
from tests.unit.decode_worker.sequences import LAYOUT, Prefilled, advance, placed, prefill, sequence, some, text_ids

MAX_BATCH = 6
GROWTH = 12
LENGTHS = (23, 60, 7, 17, 16, 41)
SAMPLING: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.2, "seed": 3}, {"temperature": 0.7, "top_k": 5})


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_decode_model(checkpoint, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> list[Prefilled]:
    whole = tiny.load_whole(checkpoint)
    return [prefill(whole, text_ids(seed, length)) for seed, length in enumerate(LENGTHS)]


class Runs:
    """An engine, its poisoned pool and its sequences, which come and go as a schedule says."""

    def __init__(self, pool: Pool, engine: DecodeEngine, prompts: list[Prefilled]) -> None:
        self.pool, self.engine, self._prompts = pool, engine, prompts
        poison(pool)
        self.live: dict[int, Sequence] = {}
        self._allocations: dict[int, Any] = {}

    def come(self, number: int) -> None:
        prompt = self._prompts[number % len(LENGTHS)]
        kept = some(number, prompt.num_tokens, ragged=number % 3 > 0)
        self._allocations[number], kv = placed(self.pool, prompt, kept, GROWTH)
        self.live[number] = sequence(prompt, kv, GROWTH, **SAMPLING[number % len(SAMPLING)])

    def go(self, number: int) -> None:
        del self.live[number]
        allocation = self._allocations.pop(number)
        self.pool.free(allocation)
        poison(self.pool, allocation)

    def move(self, number: int) -> None:
        """Out of the pool and in again, elsewhere if possible."""
        moving, room = self.live[number], self.live[number].kv.room - self.live[number].kv.appended
        exported = self.pool.export(moving.kv)
        self.go(number)
        allocation = self.pool.allocate(self.pool.sequence_bytes(exported.num_kept, room))
        moving.kv = self.pool.install(allocation, exported.num_kept, exported.body, room)
        self.live[number], self._allocations[number] = moving, allocation

    def step(self, numbers: list[int]) -> list[int]:
        batch = [self.live[number] for number in numbers]
        tokens = self.engine.step(batch)
        advance(batch, tokens)
        return tokens


def of_eager(model: Any) -> tuple[Any, Callable[[DecodeEngine, int], torch.Tensor]]:
    """A model that notes its logits, and how they are read."""
    noted: list[torch.Tensor] = []

    class Noting:
        device = CPU

        def __call__(self, **inputs: Any) -> Any:
            output = model(**inputs)
            noted[:] = [output.logits[:, -1]]
            return output

    return Noting(), lambda engine, size: noted[0][:size]


def of_graph(engine: DecodeEngine, size: int) -> torch.Tensor:
    assert isinstance(engine, GraphEngine)
    captured = min(each for each in engine._graphs if each >= size)
    return engine._graphs[captured].logits[:size]


class Together:
    """The same things happen in all runs, and every step is compared."""

    def __init__(self, runs: list[tuple[Runs, Callable[[DecodeEngine, int], torch.Tensor]]]) -> None:
        self._runs = runs
        self.steps: list[int] = []

    @property
    def able(self) -> list[int]:
        return [number for number, each in self._runs[0][0].live.items() if not each.kv.full]

    @property
    def done(self) -> list[int]:
        return [number for number, each in self._runs[0][0].live.items() if each.kv.full]

    def each(self, happens: str, number: int) -> None:
        for run, _ in self._runs:
            getattr(run, happens)(number)

    def step(self, numbers: list[int]) -> None:
        results = []
        for run, logits_of in self._runs:
            tokens = run.step(numbers)
            results.append((tokens, logits_of(run.engine, len(numbers)).clone()))
        for tokens, logits in results[1:]:
            assert tokens == results[0][0]
            torch.testing.assert_close(logits, results[0][1], rtol=1e-4, atol=1e-4)
        self.steps.append(len(numbers))


@pytest.mark.parametrize("seed", range(4))
def test_the_three_engines_agree(model: Any, prompts: list[Prefilled], seed: int) -> None:
    """Ragged sequences join, leave, skip steps, are parked and follow each other in their slots."""
    noting, noted = of_eager(model)
    slabs, blocks, graphs = (
        slab_pool(LAYOUT),
        block_pool(LAYOUT),
        block_pool(LAYOUT, block_size=4, max_num_seqs=MAX_BATCH),
    )
    together = Together(
        [
            (Runs(slabs, EagerEngine(noting, slabs), prompts), noted),
            (Runs(blocks, EagerEngine(noting, blocks), prompts), noted),
            (Runs(graphs, GraphEngine(model, graphs, max_num_seqs=MAX_BATCH), prompts), of_graph),
        ]
    )
    chance, newest = random.Random(seed), -1
    for _ in range(24):
        while len(together.able) < 8 and chance.random() < 0.6:
            newest += 1
            together.each("come", newest)
        for number in together.done + [number for number in together.able if chance.random() < 0.05]:
            together.each("go", number)
        if together.able and chance.random() < 0.3:
            together.each("move", chance.choice(together.able))
        if together.able:
            together.step(chance.sample(together.able, min(len(together.able), chance.randint(1, MAX_BATCH))))
        assert set(graphs.tables.lengths[:, graphs.tables.trash].ravel().tolist()) == {1}
        graphs.tables.check_integrity()
    assert set(together.steps) - set(batch_sizes(MAX_BATCH)), "batches that were filled up"
    assert newest > MAX_BATCH, "slots that were used again"
    for pool in (slabs, blocks, graphs):
        pool.check_integrity()


def test_padding_changes_nothing_and_goes_nowhere(model: Any, prompts: list[Prefilled]) -> None:
    """Not even when what it reads is not a number."""
    made = []
    for max_num_seqs in (3, 8):
        pool = block_pool(LAYOUT, max_num_seqs=max_num_seqs)
        run = Runs(pool, GraphEngine(model, pool, max_num_seqs=max_num_seqs), prompts)
        for number in range(3):
            run.come(number)
        tokens, bystander = [], pool.allocate(4096)
        for _ in range(GROWTH):
            for blocks in (pool.key_blocks, pool.value_blocks):
                blocks[TRASH_BLOCK] = torch.nan
            tokens.append(run.step([0, 1, 2]))
        for blocks in (pool.key_blocks, pool.value_blocks):
            assert blocks[bystander.blocks].isnan().all()
        assert set(pool.tables.lengths[:, pool.tables.trash].ravel().tolist()) == {1}
        made.append(tokens)
    assert made[0] == made[1]


def test_capturing_touches_no_sequence(model: Any, prompts: list[Prefilled]) -> None:
    pool = block_pool(LAYOUT)
    run = Runs(pool, EagerEngine(model, pool), prompts)
    run.come(1)
    run.step([1])
    before = bytes(pool.export(run.live[1].kv).body)
    run.engine = GraphEngine(model, pool, max_num_seqs=4)
    assert bytes(pool.export(run.live[1].kv).body) == before
    run.step([1])


@pytest.mark.parametrize("max_num_seqs", range(1, 70))
def test_every_batch_has_a_size_that_is_less_than_double(max_num_seqs: int) -> None:
    sizes = batch_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    assert all(min(size for size in sizes if size >= batch) < 2 * batch for batch in range(1, max_num_seqs + 1))


class OnTheDevice(TorchDispatchMode):
    """Notes operations that touch memory of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.on_the_host: list[str] = []
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.number += 1
        if any(tensor.device.type != "meta" for tensor in tensors):
            self.on_the_host.append(str(func))
        return result


@pytest.mark.parametrize("windows", [(), (8, *[0] * (LAYOUT.num_layers - 1))])
def test_a_captured_step_needs_nothing_of_the_host(windows: tuple[int, ...]) -> None:
    """On the meta device, where values cannot be known: reading one raises, bringing one from the host is noted.

    Either would fail while a CUDA graph is captured, or freeze in it what should change.
    """
    meta = torch.device("meta")
    with meta:
        model = LlavaForConditionalGeneration(tiny.config()).eval()
    model.set_attn_implementation({"text_config": DECODE_ATTENTION})
    kernels = dataclasses.replace(
        REFERENCE,
        paged_attention=lambda query, *rest: torch.empty_like(query),
        append_token=lambda *rest: None,
    )
    layout = dataclasses.replace(LAYOUT, windows=windows)
    pool = block_pool(layout, device=meta, kernels=kernels, max_num_seqs=3)
    with OnTheDevice() as watch, torch.inference_mode():
        engine = GraphEngine(model, pool, max_num_seqs=3)
        for graph in engine._graphs.values():
            graph.replay()
    assert watch.on_the_host == []
    assert watch.number > 100
    assert engine._graphs[3].logits.shape == (3, model.config.text_config.vocab_size)
    with pytest.raises(NotImplementedError, match="meta"):
        engine._graphs[3].greedy.tolist()
    with OnTheDevice() as watch:
        torch.tensor([1, 2]).to(meta)
    assert watch.on_the_host, "the watch sees"
