"""Attention rows as statistics see them, against the whole matrix in float64."""

from __future__ import annotations

import pytest
import torch

from prefill_worker.compression.rows import Rows, all_rows, last_rows, post_vision_rows, probe_rows
from tests.unit.prefill_worker.compression.observing import attention_matrix, prompt_shape, random_attention

PROMPT = prompt_shape(300, range(4, 220), seed=9)
ROWS: dict[str, Rows] = {
    "last": last_rows(PROMPT, 32),
    "post-vision": post_vision_rows(PROMPT),
    "probes": probe_rows(PROMPT),
    "all": all_rows(PROMPT),
    "scattered": (0, 7, 130, 131, 299),
    "not the end": (3, 50),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("group", [1, 3])
def test_rows_are_those_of_the_matrix(rows: Rows, group: int) -> None:
    layer = random_attention(PROMPT, seed=1, group=group)
    whole = attention_matrix(layer)
    torch.testing.assert_close(layer.weights(rows).double(), whole[:, list(rows)], rtol=1e-4, atol=1e-6)
    expected = whole[:, list(rows)].sum(dim=1).view(2, group, -1).sum(dim=1)
    torch.testing.assert_close(layer.column_sums(rows).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_sweep_serves_whoever_asks_for_its_rows() -> None:
    layer, rows = random_attention(PROMPT, seed=2), last_rows(PROMPT, 32)
    first = layer.sweep(rows, 0.01)
    assert layer.column_sums(rows) is first.column_sums
    assert layer.sweep(rows, 0.01) is first
    assert layer.sweep(rows, 0.5) is not first
