"""Policies as the quality benchmark reads them, and the oracle among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality.config import QualityConfig
from benchmarks.quality.contenders import contenders_of
from benchmarks.quality.oracle import Oracle, answer_tokens, informed
from models.shapes_vlm.questions import Sample
from prefill_worker.compression.pipeline import Selection, select_tokens
from prefill_worker.compression.policies.air_cache import AirCache
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.registry import POLICIES
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape, random_attention

PATCHES = 24
PROMPT = PromptShape(visual=torch.tensor([False] * 2 + [True] * PATCHES + [False] + [True] * PATCHES + [False] * 9))
IMAGE = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
SAMPLE = Sample(task="read", images=(IMAGE, IMAGE), question="?", answer="!", answer_patches=((), (0, 5, 23)))
ANSWER = (27, 32, 50)


def policy_of(written: str) -> Policy:
    (contender,) = contenders_of([written])
    assert contender.label == written
    return contender.policy_for(SAMPLE, PROMPT)


def kept_by(policy: Policy, budget: Budget) -> list[Selection]:
    return select_tokens(policy, [observe(policy, random_attention(PROMPT, seed)) for seed in range(3)], budget)


@pytest.mark.parametrize(
    ("written", "policy"),
    [
        ("vl_cache", VLCache()),
        ("vl_cache:shared_heads=false", VLCache(shared_heads=False)),
        ("snap_kv:window=16,pooling=max", SnapKV(window=16, pooling="max")),
        ("vl_cache:threshold=1e-1,max_rows=0,shared_heads=true", VLCache(threshold=0.1, max_rows=0)),
        ("oracle", Oracle(answer=ANSWER)),
        ("oracle:base=snap_kv,window=4", SnapKV(window=4)),
    ],
)
def test_a_policy_is_read_with_its_parameters(written: str, policy: Policy) -> None:
    assert policy_of(written) == policy


def test_all_means_every_policy_and_nobody_runs_twice() -> None:
    labels = [each.label for each in contenders_of(["snap_kv", "all", "oracle", "vl_cache"])]
    assert labels[0] == "snap_kv"
    assert labels[-1] == "oracle"
    assert sorted(labels[:-1]) == sorted(POLICIES)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"policies": ("vl_cach",)}, "unknown policy 'vl_cach'; known: "),
        ({"policies": ("vl_cache:heads=1",)}, "vl_cache has no parameter 'heads'; it has budget"),
        ({"policies": ("vl_cache:shared_heads=1",)}, "shared_heads must be a bool, not 1"),
        ({"policies": ("vl_cache:shared_heads",)}, "not of the form name:parameter=value"),
        ({"policies": ("vl_cache:",)}, "not of the form name:parameter=value"),
        ({"policies": ("snap_kv:window=0",)}, r"window must lie in \[1, 256\], not 0"),
        ({"policies": ("oracle:window=4",)}, "only base has parameters, not window"),
        ({"policies": ("oracle:base=nobody",)}, "unknown policy 'nobody'"),
        ({"policies": ("oracle:base=fast_v",)}, "fast_v: chooses during its pass"),
        ({"policies": ()}, "at least one policy"),
        ({"retentions": (0.1, 0.0)}, r"retention is the kept share and must lie in \(0, 1\], not 0.0"),
        ({"retentions": ()}, "at least one policy"),
        ({"tasks": ("dance",)}, r"unknown tasks \['dance'\]; known: read"),
        ({"samples": 10}, "at least one sample per task"),
        ({"max_new_tokens": 1}, "max_new_tokens must be at least 2"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualityConfig(**setting)


def test_the_scope_is_that_of_every_budget() -> None:
    config = QualityConfig(retentions=(0.5, 0.1), scope="visual")
    assert config.budgets == {share: Budget(retention=share, scope=BudgetScope.VISUAL) for share in (0.5, 0.1)}


def test_answer_patches_are_found_behind_the_text_between_images() -> None:
    assert answer_tokens(SAMPLE, PROMPT) == ANSWER


def test_the_oracle_keeps_answer_then_text_then_what_is_looked_at() -> None:
    text = (~PROMPT.visual).nonzero().flatten().tolist()
    for selection in kept_by(policy_of("oracle"), Budget(max_kept_tokens=19)):
        assert selection.chosen is not None
        for head in selection.chosen:
            kept = head.nonzero().flatten().tolist()
            assert set(ANSWER) | set(text) <= set(kept)
            assert len(kept) == 19
    many = tuple(range(3, 23))
    for selection in kept_by(Oracle(answer=many), Budget(max_kept_tokens=18)):
        assert selection.chosen is not None
        assert set(selection.chosen.nonzero()[:, 1].tolist()) < set(many)


@pytest.mark.parametrize("base", ["vl_cache", "snap_kv", "ada_kv", "air_cache", "h2o"])
def test_an_informed_policy_keeps_the_answer_within_the_budgets_of_its_base(base: str) -> None:
    budget = Budget(max_kept_tokens=20)
    alone, told = kept_by(policy_of(base), budget), kept_by(policy_of(f"oracle:base={base}"), budget)
    for before, after in zip(alone, told, strict=True):
        assert before.chosen is not None
        assert after.chosen is not None
        assert before.chosen.sum() == after.chosen.sum()
        assert after.chosen[:, list(ANSWER)].all()
    assert not all(before.chosen[:, list(ANSWER)].all() for before in alone if before.chosen is not None)


def test_telling_a_policy_leaves_the_one_that_was_told_alone() -> None:
    policy, budget = SnapKV(), Budget(max_kept_tokens=20)
    before = [positions(selection) for selection in kept_by(policy, budget)]
    told = informed(policy, ANSWER)
    assert told.for_prompt(PROMPT) is told
    assert policy.for_prompt(PROMPT) is policy
    assert [positions(selection) for selection in kept_by(told, budget)] != before
    assert [positions(selection) for selection in kept_by(policy, budget)] == before


def test_whoever_takes_over_a_prompt_is_told_too() -> None:
    words = prompt_shape(40)
    other = AirCache().for_prompt(words)
    assert other != AirCache()
    layer = observe(other, random_attention(words, 1))
    scores = informed(AirCache(), (3, 5)).for_prompt(words).score(layer)
    assert torch.isinf(scores[:, [3, 5]]).all()
    rest = [place for place in range(40) if place not in (3, 5)]
    torch.testing.assert_close(scores[:, rest], other.score(layer)[:, rest])
