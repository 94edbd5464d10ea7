"""H2O, and attention accumulated over all rows or probes: against loops over the attention matrix."""

from __future__ import annotations

import pytest
import torch

from prefill_worker.compression.accumulated import column_sums, received, rows_that_see
from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.h2o import H2O
from prefill_worker.compression.rows import probe_rows
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

PROMPT = prompt_shape(300, range(20, 260), seed=6)
LAYER = random_attention(PROMPT, seed=9, group=2)
# [KV head][query head of the group][row][key]
ATTENTION = attention_matrix(LAYER).view(2, 2, 300, 300).tolist()


def naive_received(attention: list[list[list[float]]], rows: list[int], average: bool) -> list[float]:
    """One KV head."""
    sums = [sum(head[row][key] for head in attention for row in rows) for key in range(len(attention[0]))]
    return [total / sum(row >= key for row in rows) if average else total for key, total in enumerate(sums)]


@pytest.mark.parametrize("rows", ["all", "probe"])
def test_what_each_key_receives(rows: str) -> None:
    observed = received(observe(H2O(rows=rows), LAYER), rows)
    listed = [*range(300)] if rows == "all" else list(probe_rows(PROMPT))
    expected = [naive_received(head, listed, rows == "probe") for head in ATTENTION]
    torch.testing.assert_close(observed, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_probes_are_few_and_end_with_the_prompt() -> None:
    probes = column_sums(PROMPT, "probe").rows
    assert len(probes) == 128
    assert probes[-1] == 299
    assert rows_that_see(probes, torch.empty(2, 300))[[0, 299]].tolist() == [128, 1]


@pytest.mark.parametrize(("rows", "recent_share"), [("all", 0.5), ("all", 0.29), ("probe", 0.5), ("all", 0.0)])
def test_h2o_is_the_naive_method(rows: str, recent_share: float) -> None:
    policy = H2O(rows=rows, recent_share=recent_share)
    (selection,) = select_tokens(policy, [observe(policy, LAYER)], Budget(max_kept_tokens=41))
    listed = [*range(300)] if rows == "all" else list(probe_rows(PROMPT))
    window = {0.5: 20, 0.29: 11, 0.0: 0}[recent_share]
    expected = []
    for head in ATTENTION:
        scores = naive_received(head, listed, rows == "probe")
        heavy = sorted(range(300 - window), key=lambda at: (-scores[at], at))[: 41 - window]
        expected.append(sorted([*heavy, *range(300 - window, 300)]))
    assert positions(selection) == expected
    assert selection.merged is None


@pytest.mark.parametrize("parameters", [{"rows": "some"}, {"recent_share": 1.1}, {"recent_share": -0.1}])
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        H2O(**parameters)  # type: ignore[arg-type]
