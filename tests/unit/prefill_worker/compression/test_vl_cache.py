"""VL-Cache on statistics made by hand; the whole method on a model is in `test_vl_cache_oracle`."""

import math

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import keep_everything, select_tokens
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.rows import post_vision_rows
from prefill_worker.compression.statistics import ColumnSums, ObservedLayer, Sweep
from shared.kernels.reference.statistics import PostVisionStatistics
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape

# V6: attention of rows 2 and 3 of a prompt of 4 tokens whose first two are visual
ROWS = [[0.7, 0.295, 0.005], [0.6, 0.004, 0.388, 0.008]]


def observed(policy: VLCache) -> ObservedLayer:
    """One head whose attention rows are given: keys are unit vectors, queries hold the logits."""
    logits = [[0.0] * 4, [0.0] * 4, *([math.log(value) for value in row] + [0.0] * (4 - len(row)) for row in ROWS)]
    key = torch.eye(4)[None]
    prompt = prompt_shape(4, visual=(0, 1))
    return observe(policy, LayerAttention(prompt=prompt, query=torch.tensor([logits]), key=key, value=key, scaling=1.0))


def test_statistics_of_two_rows() -> None:
    """V6: .005 and .004 lie below 1 % of their rows' maxima, .008 does not."""
    policy = VLCache()
    layer = observed(policy)
    assert policy.sparsity(layer) == pytest.approx(2 / 7)
    assert policy.score(layer)[0].tolist() == pytest.approx([1.3, 0.299, 0.393, 0.008])


@pytest.mark.parametrize(("kept", "expected"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
def test_the_tokens_that_receive_most_attention_are_kept(kept: int, expected: list[int]) -> None:
    """V6."""
    policy = VLCache(recent_share=0.0, min_tokens=1)
    assert positions(policy.select(policy.score(observed(policy)), [kept])) == [expected]


def layer_of(policy: VLCache, mass: torch.Tensor, counts: list[int]) -> ObservedLayer:
    """A layer of which only statistics are known."""
    prompt = prompt_shape(mass.shape[1])
    sweep = Sweep(post_vision_rows(prompt, policy.max_rows), policy.threshold)
    found = PostVisionStatistics(mass, torch.tensor(counts), None, None)
    measured = {sweep: found, ColumnSums(post_vision_rows(prompt)): mass}
    return ObservedLayer(prompt=prompt, key=torch.empty(0), value=torch.empty(0), measured=measured)


def two_heads(policy: VLCache) -> ObservedLayer:
    mass = torch.tensor([[5.0, 0, 4, 0, 0, 1], [0, 3, 0, 6, 0.5, 0.5]])
    return layer_of(policy, mass, [8, 8, 13, 13])  # of 21 causal entries


def test_each_kv_head_chooses_for_itself_where_asked() -> None:
    policy = VLCache(recent_share=0.0, shared_heads=False)
    assert positions(policy.select(policy.score(two_heads(policy)), [2, 2])) == [[0, 2], [1, 3]]


def test_shared_heads_choose_together() -> None:
    policy = VLCache(recent_share=0.0)
    assert positions(policy.select(policy.score(two_heads(policy)), [3, 3])) == [[0, 2, 3]] * 2


def test_sparsity_is_the_mean_over_query_heads() -> None:
    policy = VLCache()
    assert policy.sparsity(two_heads(policy)) == pytest.approx(0.5)


def test_the_pipeline_reports_the_mass_that_it_kept() -> None:
    policy = VLCache(recent_share=0.0, min_tokens=1, shared_heads=False)
    (selection,) = select_tokens(policy, [two_heads(policy)], Budget(max_kept_tokens=2))
    assert positions(selection) == [[0, 2], [1, 3]]
    assert selection.attention_mass == pytest.approx(0.9)


def test_retention_one_keeps_everything_without_choosing() -> None:
    assert [(kept.chosen, kept.attention_mass, kept.merged) for kept in keep_everything(3)] == [(None, 1.0, None)] * 3


def test_a_denser_layer_gets_more_and_requests_do_not_mix() -> None:
    policy = VLCache(min_tokens=1)
    sparse, dense = (layer_of(policy, torch.rand(2, 100), [count] * 4) for count in (100, 300))
    first = select_tokens(policy, [dense, sparse], Budget(retention=0.2))
    assert [kept.num_kept(2, 100) for kept in first] == [[30, 30], [10, 10]]
    select_tokens(policy, [sparse, sparse], Budget(retention=0.5))
    again = select_tokens(policy, [dense, sparse], Budget(retention=0.2))
    assert all(positions(a) == positions(b) for a, b in zip(first, again, strict=True))


def test_uniform_budgets_differ_in_nothing_but_the_counts() -> None:
    uniform, strict = VLCache(budget="uniform"), VLCache()
    layers = [layer_of(uniform, torch.rand(2, 205), [count] * 4) for count in (100, 300)]
    alike = select_tokens(uniform, layers, Budget(retention=0.3))
    assert [kept.num_kept(2, 205) for kept in alike] == [[61, 61], [61, 61]]
    wanted = [strict.select(strict.score(layer), [61, 61]) for layer in layers]
    assert [positions(kept) for kept in alike] == [positions(chosen) for chosen in wanted]
    assert [kept.num_kept(2, 205) for kept in select_tokens(uniform, layers, Budget(retention=0.05))] == [[16, 16]] * 2
