"""VL-Cache on statistics made by hand; the whole method on a model is in `test_vl_cache_oracle`."""

import math
from fractions import Fraction

import pytest
import torch

from prefill_worker.compression.pipeline import keep_everything, select_tokens
from prefill_worker.compression.policy import LayerStatistics
from prefill_worker.compression.vl_cache import VLCache
from shared.kernels.reference.statistics import post_vision_statistics

# V6: attention of rows 2 and 3 of a prompt of 4 tokens whose first two are visual
ROWS = [[0.7, 0.295, 0.005], [0.6, 0.004, 0.388, 0.008]]


def observed(rows: list[list[float]], threshold: float) -> LayerStatistics:
    """Statistics of one head whose attention rows are given: keys are unit vectors, queries hold the logits."""
    size = len(rows[-1])
    query = torch.tensor([[math.log(value) for value in row] + [0.0] * (size - len(row)) for row in rows])
    columns, counts, *_ = post_vision_statistics(query[None], torch.eye(size)[None], size - len(rows), 1.0, threshold)
    entries = sum(len(row) for row in rows)
    return LayerStatistics(column_mass=columns, kept_entries=counts, causal_entries=entries, row_mass=len(rows))


def test_statistics_of_two_rows() -> None:
    """V6: .005 and .004 lie below 1 % of their rows' maxima, .008 does not."""
    layer = observed(ROWS, threshold=0.01)
    assert layer.sparsity() == pytest.approx(2 / 7)
    assert layer.column_mass[0].tolist() == pytest.approx([1.3, 0.299, 0.393, 0.008])
    assert layer.row_mass == pytest.approx(layer.column_mass.sum().item())


@pytest.mark.parametrize(("kept", "expected"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
def test_the_tokens_that_receive_most_attention_are_kept(kept: int, expected: list[int]) -> None:
    """V6."""
    policy = VLCache(recent_share=0.0, min_tokens=1)
    assert policy.select(policy.score(observed(ROWS, 0.01)), kept).tolist() == [expected]


def two_heads() -> LayerStatistics:
    mass = torch.tensor([[5.0, 0, 4, 0, 0, 1], [0, 3, 0, 6, 0.5, 0.5]])
    return LayerStatistics(column_mass=mass, kept_entries=torch.tensor([4, 4, 6, 6]), causal_entries=10, row_mass=10.0)


def test_each_kv_head_chooses_for_itself() -> None:
    policy = VLCache(recent_share=0.0)
    assert policy.select(policy.score(two_heads()), 2).tolist() == [[0, 2], [1, 3]]


def test_shared_heads_choose_together() -> None:
    policy = VLCache(recent_share=0.0, shared_heads=True)
    assert policy.select(policy.score(two_heads()), 3).tolist() == [[0, 2, 3]] * 2


def test_sparsity_is_the_mean_over_query_heads() -> None:
    assert two_heads().sparsity() == pytest.approx(0.5)


def test_the_pipeline_reports_the_mass_that_it_kept() -> None:
    policy = VLCache(recent_share=0.0, min_tokens=1)
    (selection,) = select_tokens(policy, [two_heads()], Fraction(1, 3), 6)
    assert selection.indices is not None
    assert selection.indices.tolist() == [[0, 2], [1, 3]]
    assert selection.attention_mass == pytest.approx(0.9)


def test_retention_one_keeps_everything_without_indices() -> None:
    assert [(kept.indices, kept.attention_mass) for kept in keep_everything(3)] == [(None, 1.0)] * 3


def test_a_denser_layer_gets_more_and_requests_do_not_mix() -> None:
    sparse = LayerStatistics(
        column_mass=torch.rand(2, 100), kept_entries=torch.tensor([100] * 4), causal_entries=1000, row_mass=20.0
    )
    dense = LayerStatistics(
        column_mass=torch.rand(2, 100), kept_entries=torch.tensor([300] * 4), causal_entries=1000, row_mass=20.0
    )
    policy = VLCache(min_tokens=1)
    first = select_tokens(policy, [dense, sparse], Fraction(1, 5), 100)
    assert [kept.indices.shape[1] for kept in first] == [30, 10]
    select_tokens(policy, [sparse, sparse], Fraction(1, 2), 100)
    again = select_tokens(policy, [dense, sparse], Fraction(1, 5), 100)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(first, again, strict=True))
