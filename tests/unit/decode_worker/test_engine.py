"""One step of a ragged batch, against transformers and against a full cache whose evicted entries are masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from decode_worker.engine import EagerEngine, highest_tokens
from decode_worker.sequence import Sequence
from shared.model.loading import load_decode_model
from shared.model.processor import load_processor
from shared.model.sampler import sample
from tests.unit.decode_worker.pools import CPU, POOLS, Pool, poison
from tests.unit.decode_worker.sequences import (
    LAYOUT,
    DoublePool,
    Kept,
    Prefilled,
    advance,
    everything,
    pooled,
    prefill,
    sequence,
    some,
    text_ids,
)
from tests.unit.decode_worker.tiny import load_whole

STEPS = 16
LENGTHS = (23, 60, 7)


def masked_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, evicted: Any = None, **_: Any
) -> Any:
    """Attention over the full cache; `evicted` [layer][kv head] are positions that must not be seen."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    logits = query @ key.transpose(2, 3) * scaling
    if query.shape[2] > 1:
        logits = logits.masked_fill(torch.ones(logits.shape[2:]).triu(1).bool(), -torch.inf)
    for kv_head, positions in enumerate(evicted[module.layer_idx] if evicted else ()):
        logits[:, kv_head * group : (kv_head + 1) * group, :, positions] = -torch.inf
    return (logits.softmax(dim=-1) @ value).transpose(1, 2), None


AttentionInterface.register("masked_oracle", masked_attention)


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    """The whole model in double precision."""
    return load_whole(checkpoint, torch.float64, {"text_config": "masked_oracle", "vision_config": "eager"})


class Recorded:
    """A model whose logits are seen before the engine rounds them, and its inputs."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device = CPU
        self.logits = torch.empty(0)
        self.positions: list[list[int]] = []

    def __call__(self, **inputs: Any) -> Any:
        self.positions.append(inputs["position_ids"][:, 0].tolist())
        output = self._model(**inputs)
        self.logits = output.logits[:, -1]
        return output


@pytest.fixture(scope="module")
def double(checkpoint: Path) -> Recorded:
    return Recorded(load_decode_model(checkpoint, dtype=torch.float64, device=CPU))


@pytest.fixture(scope="module")
def single(checkpoint: Path) -> Recorded:
    return Recorded(load_decode_model(checkpoint, dtype=torch.float32, device=CPU))


@pytest.fixture(params=["slabs", "blocks of 16"])
def pool(request: pytest.FixtureRequest) -> Pool:
    """The same test over both storages."""
    made = POOLS[request.param](LAYOUT, 4 << 20)
    poison(made)
    return made


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> list[Prefilled]:
    whole = load_whole(checkpoint)
    return [prefill(whole, text_ids(seed, length)) for seed, length in enumerate(LENGTHS)]


def test_only_the_language_model_is_loaded(single: Recorded) -> None:
    names = {name for name, _ in single._model.named_parameters()}
    assert all(name.startswith(("model.language_model", "lm_head")) for name in names)


@torch.inference_mode()
def masked_step(oracle: Any, prompt: Prefilled, kept: Kept, token: int, position: int) -> torch.Tensor:
    evicted = [[[p for p in range(prompt.num_tokens) if p not in set(head)] for head in heads] for heads in kept]
    output = oracle(
        input_ids=torch.tensor([[token]]),
        position_ids=torch.tensor([[position]]),
        past_key_values=prompt.cache,
        use_cache=True,
        evicted=evicted,
    )
    return output.logits[0, -1]


@pytest.mark.parametrize("ragged", [True, False])
def test_compressed_decode_is_a_full_cache_with_the_evicted_masked(oracle: Any, double: Recorded, ragged: bool) -> None:
    prompts = [prefill(oracle, text_ids(seed, length)) for seed, length in enumerate(LENGTHS)]
    kept = [some(seed, prompt.num_tokens, ragged=ragged) for seed, prompt in enumerate(prompts)]
    memory = DoublePool()
    batch = [
        sequence(prompt, memory.install(prompt, keep, STEPS), STEPS) for prompt, keep in zip(prompts, kept, strict=True)
    ]
    engine = EagerEngine(double, memory)
    for step in range(STEPS):
        fed = [each.last_token for each in batch]
        advance(batch, engine.step(batch))
        assert double.positions[-1] == [prompt.num_tokens + step for prompt in prompts], "never renumbered"
        for row, (prompt, keep, token) in enumerate(zip(prompts, kept, fed, strict=True)):
            expected = masked_step(oracle, prompt, keep, token, prompt.num_tokens + step)
            assert expected.dtype == double.logits.dtype == torch.float64
            torch.testing.assert_close(double.logits[row], expected, rtol=0, atol=1e-9)


def test_single_precision_stays_close_to_the_oracle(
    oracle: Any, single: Recorded, pool: Pool, prompts: list[Prefilled]
) -> None:
    exact = [prefill(oracle, text_ids(seed, length)) for seed, length in enumerate(LENGTHS)]
    kept = [some(seed, prompt.num_tokens) for seed, prompt in enumerate(prompts)]
    batch = [
        sequence(prompt, pooled(pool, prompt, keep, STEPS), STEPS) for prompt, keep in zip(prompts, kept, strict=True)
    ]
    engine = EagerEngine(single, pool)
    for step in range(STEPS):
        fed = [each.last_token for each in batch]
        advance(batch, engine.step(batch))
        for row, (prompt, keep, token) in enumerate(zip(exact, kept, fed, strict=True)):
            expected = masked_step(oracle, prompt, keep, token, prompt.num_tokens + step)
            error = (single.logits[row].double() - expected).abs().max() / expected.abs().max()
            assert error < 2e-5


def decode_alone(engine: EagerEngine, each: Sequence, steps: int) -> tuple[list[int], list[torch.Tensor]]:
    tokens, logits = [], []
    for _ in range(steps):
        advance([each], engine.step([each]))
        tokens.append(each.last_token)
        logits.append(engine._model.logits[0])
    return tokens, logits


def test_a_batch_computes_what_each_computes_alone(single: Recorded, pool: Pool, prompts: list[Prefilled]) -> None:
    engine, kept = EagerEngine(single, pool), [some(seed, prompt.num_tokens) for seed, prompt in enumerate(prompts)]

    def fresh(number: int) -> Sequence:
        return sequence(prompts[number], pooled(pool, prompts[number], kept[number], STEPS), STEPS)

    alone = [decode_alone(engine, fresh(number), STEPS) for number in range(3)]
    # the second joins late, the third leaves early
    batch, made = [fresh(number) for number in range(3)], [[], [], []]
    for step in range(STEPS + 4):
        present = [n for n in range(3) if (n != 1 or step >= 4) and (n != 2 or step < 9) and len(made[n]) < STEPS]
        if not present:
            break
        advance([batch[n] for n in present], engine.step([batch[n] for n in present]))
        for row, n in enumerate(present):
            torch.testing.assert_close(single.logits[row], alone[n][1][len(made[n])], rtol=1e-4, atol=1e-4)
            made[n].append(batch[n].last_token)
    assert made == [alone[0][0], alone[1][0], alone[2][0][:9]]


@pytest.mark.parametrize("with_image", [False, True])
def test_at_retention_one_the_tokens_are_those_of_generate(
    checkpoint: Path, single: Recorded, pool: Pool, with_image: bool
) -> None:
    whole, inputs = load_whole(checkpoint), {}
    ids = text_ids(5, 30)
    if with_image:
        from_processor = load_processor(checkpoint)
        encoded = from_processor(
            images=[torch.zeros(3, 28, 28).byte().numpy()], text="<image> and", return_tensors="pt"
        )
        ids = encoded["input_ids"][0].tolist()
        inputs = {"pixel_values": encoded["pixel_values"]}
    whole.generation_config.eos_token_id = None
    generated = whole.generate(input_ids=torch.tensor([ids]), max_new_tokens=STEPS + 1, do_sample=False, **inputs)
    prompt = prefill(whole, ids, **inputs)
    each = sequence(prompt, pooled(pool, prompt, everything(len(ids)), STEPS), STEPS)
    tokens, _ = decode_alone(EagerEngine(single, pool), each, STEPS)
    assert [prompt.first_token, *tokens] == generated[0, len(ids) :].tolist()
    assert len(set(tokens)) > 3, "an answer that says something"


def test_greedy_and_sampled_sequences_share_a_batch(single: Recorded, pool: Pool, prompts: list[Prefilled]) -> None:
    engine, settings = (
        EagerEngine(single, pool),
        [{}, {"temperature": 1.3, "seed": 4}, {"temperature": 0.8, "top_k": 3}],
    )
    batch = [
        sequence(prompt, pooled(pool, prompt, everything(prompt.num_tokens), STEPS), STEPS, **how)
        for prompt, how in zip(prompts, settings, strict=True)
    ]
    for step in range(STEPS):
        tokens = engine.step(batch)
        for row, (each, prompt) in enumerate(zip(batch, prompts, strict=True)):
            # the prompt, the first token, and one more per step
            assert tokens[row].token == sample(single.logits[row], each.sampling, prompt.num_tokens + 1 + step)
        assert tokens[0].token == int(single.logits[0].argmax())
        advance(batch, tokens)


def test_a_sampled_stream_depends_on_its_seed_alone(single: Recorded, pool: Pool, prompts: list[Prefilled]) -> None:
    engine = EagerEngine(single, pool)

    def fresh(seed: int) -> Sequence:
        kv = pooled(pool, prompts[0], everything(prompts[0].num_tokens), STEPS)
        return sequence(prompts[0], kv, STEPS, temperature=1.5, seed=seed)

    alone, _ = decode_alone(engine, fresh(1), STEPS)
    batch = [fresh(2), fresh(1)]
    made: list[int] = []
    for _ in range(STEPS):
        advance(batch, engine.step(batch))
        made.append(batch[1].last_token)
    assert made == alone
    assert decode_alone(engine, fresh(2), STEPS)[0] != alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_equals(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 5000, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1:, [7, 40, 4999]] = 9.0
    assert highest_tokens(logits).tolist() == logits.float().argmax(dim=-1).tolist()
    assert highest_tokens(logits)[1:].tolist() == [7] * 8
