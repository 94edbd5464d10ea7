"""A text pass over a retained prefix is the whole pass, and what it must not see is as good as gone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from benchmarks.local_pipeline import LocalPipeline, local_job
from benchmarks.quality.runner import messages_for
from benchmarks.second_question.config import SecondQuestionConfig
from benchmarks.second_question.outcome import FULL, OTHER, OWN, PREFIX, SAME
from benchmarks.second_question.pair import PairInPasses
from benchmarks.second_question.prefix import Prefix, Queries
from benchmarks.second_question.reuse import Choice, watched
from benchmarks.second_question.text_pass import TextEngine, load_engine
from models.shapes_vlm.pairs import draw_pairs
from models.shapes_vlm.paths import CHECKPOINT
from prefill_worker.compression.pipeline import statistics_for
from prefill_worker.compression.registry import build_policy
from prefill_worker.config import PrefillConfig
from prefill_worker.engine.engine import Prefilled
from prefill_worker.prompt import Prompt
from shared.request.params import Budget
from tests.unit.decode_worker.tiny import load_whole

POLICIES = ("vl_cache", "mix_kv", "expected_attention", "streaming_llm", "look_ahead")
CONFIG = SecondQuestionConfig(pairs=1, tasks=("read",), policies=POLICIES, retentions=(0.1,), max_new_tokens=12)
# Between kernels that add in another order, fp32.
CLOSE: dict[str, float] = {"atol": 2e-4, "rtol": 1e-3}


@pytest.fixture(scope="module")
def pipeline() -> LocalPipeline:
    return LocalPipeline(str(CHECKPOINT), dtype="float32", threads=1, kv_memory_mib=32, max_num_seqs=4)


@pytest.fixture(scope="module")
def engine() -> TextEngine:
    return load_engine(PrefillConfig(model=str(CHECKPOINT), dtype="float32", threads=1))


@pytest.fixture(scope="module")
def passes(pipeline: LocalPipeline, engine: TextEngine) -> PairInPasses:
    (pair,) = draw_pairs(seed=2, count=1, tasks=("read",))
    return PairInPasses(pipeline=pipeline, engine=engine, config=CONFIG, pair=pair)


def whole(engine: TextEngine, prompt: Prompt, statistics: Any) -> Prefilled:
    return engine.prefill(prompt, statistics, threading.Event())


def half(prefix: Prefix, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(key.shape[:2], generator=generator) < 0.5 for key in prefix.keys]


@pytest.mark.parametrize("name", POLICIES)
def test_over_the_whole_prefix_it_is_the_whole_pass(passes: PairInPasses, engine: TextEngine, name: str) -> None:
    statistics = statistics_for(build_policy(name, {}), passes.second.shape)
    one = whole(engine, passes.second, statistics)
    other = engine.prefill_text(passes.second, passes.prefix, statistics)
    torch.testing.assert_close(other.logits, one.logits, **CLOSE)
    for layer, (mine, its) in enumerate(zip(other.measured, one.measured, strict=True)):
        torch.testing.assert_close(other.keys[layer], one.keys[layer], **CLOSE)
        torch.testing.assert_close(other.values[layer], one.values[layer], **CLOSE)
        for statistic in statistics:
            torch.testing.assert_close(mine[statistic], its[statistic], **CLOSE)


def test_the_prefix_ends_with_the_last_image_token_and_stays_as_it_is(passes: PairInPasses, engine: TextEngine) -> None:
    prefix, visual = passes.prefix, passes.second.shape.visual
    assert visual[prefix.num_tokens - 1]
    assert not visual[prefix.num_tokens :].any()
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values, *prefix.queries)]
    engine.prefill_text(passes.second, prefix, (), half(prefix))
    after = (*prefix.keys, *prefix.values, *prefix.queries)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    # 4 KV heads and 8 query heads
    assert prefix.kv_bytes == prefix.query_bytes == sum(tensor.nbytes for tensor in before) / 2


@torch.inference_mode()
def test_text_over_a_part_is_what_transformers_gives_with_that_part_masked(
    passes: PairInPasses, engine: TextEngine
) -> None:
    prompt, prefix = passes.second, passes.prefix
    seen = torch.rand(prefix.num_tokens, generator=torch.Generator().manual_seed(1)) < 0.3
    num_tokens = prompt.shape.num_tokens
    allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    allowed[prefix.num_tokens :, : prefix.num_tokens] &= seen
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    truth = load_whole(CHECKPOINT)(**prompt.inputs, attention_mask=bias[None, None]).logits[0, -1]
    found = engine.prefill_text(prompt, prefix, (), [seen.expand(key.shape[:2]) for key in prefix.keys])
    torch.testing.assert_close(found.logits, truth, **CLOSE)
    everything = engine.prefill_text(prompt, prefix, ())
    assert (everything.logits - truth).abs().max() > 0.1, "the mask must matter"


def test_what_it_must_not_see_may_be_anything(passes: PairInPasses, engine: TextEngine) -> None:
    prompt, prefix = passes.second, passes.prefix
    seen = half(prefix)
    poisoned = Prefix(
        keys=[torch.where(some[..., None], key, 50.0) for some, key in zip(seen, prefix.keys, strict=True)],
        values=[torch.where(some[..., None], value, 50.0) for some, value in zip(seen, prefix.values, strict=True)],
        queries=prefix.queries,
    )
    clean = engine.prefill_text(prompt, prefix, (), seen)
    torch.testing.assert_close(engine.prefill_text(prompt, poisoned, (), seen).logits, clean.logits, **CLOSE)
    swapped = [some.flip(0) for some in seen]
    assert not torch.allclose(engine.prefill_text(prompt, poisoned, (), swapped).logits, clean.logits, atol=1e-2)


def test_a_watched_policy_is_the_policy(pipeline: LocalPipeline, passes: PairInPasses, engine: TextEngine) -> None:
    for name in ("vl_cache", "look_ahead"):
        policy, choice = build_policy(name, {}), Choice()
        prefilled = whole(engine, passes.second, statistics_for(policy, passes.second.shape))
        parcels = [
            pipeline.compress(
                passes.second, prefilled, local_job(each, Budget(retention=0.1), max_new_tokens=CONFIG.max_new_tokens)
            )
            for each in (policy, watched(policy, choice))
        ]
        assert bytes(parcels[0].body) == bytes(parcels[1].body)
        fed = len(parcels[0].manifest.generated) - 1
        counts = [int(count) for chosen in choice for count in chosen.sum(dim=1) + fed]
        assert counts == list(parcels[0].manifest.num_kept)


def test_ways_keep_what_they_say(pipeline: LocalPipeline, engine: TextEngine) -> None:
    (pair,) = draw_pairs(seed=7, count=1, tasks=("shape",))
    passes = PairInPasses(pipeline=pipeline, engine=engine, config=CONFIG, pair=pair)
    ways = list(passes.ways())
    assert [way.name for way in ways] == [FULL, *[OWN, PREFIX, SAME, OTHER] * len(POLICIES)]
    parcels = {(way.name, way.setting.policy): way.parcel.manifest for way in ways}
    text = passes.second.shape.num_tokens - passes.prefix.num_tokens
    for policy in POLICIES:
        own, prefix = parcels[OWN, policy], parcels[PREFIX, policy]
        assert own.num_kept == prefix.num_kept
        assert own.generated == prefix.generated
        for name in (SAME, OTHER):
            kept = parcels[name, policy]
            assert kept.next_position == passes.second.shape.num_tokens
            assert min(kept.num_kept) > text
    # the same images for any question, but for what room the texts take
    assert parcels[FULL, "full"].num_kept == (passes.second.shape.num_tokens,) * len(parcels[OWN, "vl_cache"].num_kept)
    assert [each.common for each in passes.agreements] == [each.kept for each in passes.agreements]


def test_other_is_made_of_what_the_first_question_kept(pipeline: LocalPipeline, engine: TextEngine) -> None:
    (pair,) = draw_pairs(seed=9, count=1, tasks=("colour",))
    config = SecondQuestionConfig(pairs=1, tasks=("colour",), policies=("snap_kv",), retentions=(0.2,))
    passes = PairInPasses(pipeline=pipeline, engine=engine, config=config, pair=pair)
    manifests = {way.name: way.parcel.manifest for way in passes.ways()}
    text = passes.second.shape.num_tokens - passes.prefix.num_tokens
    for name, prompt in ((SAME, passes.second), (OTHER, passes.first)):
        policy, choice = build_policy("snap_kv", {}), Choice()
        prefilled = whole(engine, prompt, statistics_for(policy, prompt.shape))
        job = local_job(watched(policy, choice), Budget(retention=0.2), max_new_tokens=2)
        pipeline.compress(prompt, prefilled, job)
        images = [int(count) for chosen in choice for count in chosen[:, : passes.prefix.num_tokens].sum(dim=1)]
        assert list(manifests[name].num_kept) == [count + text for count in images]


def test_prompts_that_differ_before_the_question_are_refused(pipeline: LocalPipeline, engine: TextEngine) -> None:
    one, other = draw_pairs(seed=2, count=2, tasks=("read",))
    with pytest.raises(ValueError, match="differ before"):
        PairInPasses(pipeline=pipeline, engine=engine, config=CONFIG, pair=(one[0], other[1]))


def test_queries_are_those_of_every_token(pipeline: LocalPipeline, engine: TextEngine) -> None:
    (pair,) = draw_pairs(seed=2, count=1, tasks=("read",))
    prompt = pipeline.build(messages_for(pair[0]), max_new_tokens=2)
    measured = whole(engine, prompt, (Queries(),)).measured
    assert {each[Queries()].shape[1] for each in measured} == {prompt.shape.num_tokens}
