"""Keyformer: noise on the logits, against the definition with logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from prefill_worker.compression.attention import BLOCK_ROWS, LayerAttention
from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.keyformer import Keyformer
from prefill_worker.compression.rows import probe_rows
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape, random_attention

TOKENS = 300
PROMPT = prompt_shape(TOKENS, range(4, 250), seed=2**64 - 3)
LAYER = random_attention(PROMPT, seed=3)


def naive_scores(layer: LayerAttention, rows: list[int]) -> torch.Tensor:
    """[num_kv_heads, num_tokens] float64: softmax of logits plus Gumbel noise, summed over rows and the group."""
    generator = torch.Generator().manual_seed(layer.prompt.seed)
    sums = torch.zeros(2, TOKENS, dtype=torch.float64)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        gumbel = -torch.empty(4, len(block), block[-1] + 1).exponential_(generator=generator).double().log()
        for head in range(4):
            for index, row in enumerate(block):
                keys = layer.key[head // 2, : row + 1].double()
                logits = keys @ layer.query[head, row].double() * layer.scaling
                sums[head // 2, : row + 1] += (logits + gumbel[head, index, : row + 1]).softmax(dim=0)
    return sums


@pytest.mark.parametrize("rows", ["all", "probe"])
def test_it_is_the_naive_method(rows: str) -> None:
    policy = Keyformer(rows=rows)
    layer = observe(policy, LAYER)
    listed = list(range(TOKENS) if rows == "all" else probe_rows(PROMPT))
    scores = naive_scores(LAYER, listed)
    if rows == "probe":
        scores /= torch.tensor([sum(row >= at for row in listed) for at in range(TOKENS)])
    torch.testing.assert_close(policy.score(layer).double(), scores, rtol=1e-4, atol=1e-6)
    (selection,) = select_tokens(policy, [layer], Budget(max_kept_tokens=40))
    expected = []
    for head in scores.tolist():
        best = sorted(range(TOKENS - 12), key=lambda at: (-head[at], at))[:28]
        expected.append(sorted([*best, *range(TOKENS - 12, TOKENS)]))
    assert positions(selection) == expected


def test_each_row_still_sums_to_one() -> None:
    policy = Keyformer()
    total = policy.score(observe(policy, LAYER)).sum(dim=1)
    torch.testing.assert_close(total, torch.full((2,), 2.0 * TOKENS))


def test_the_prompt_says_the_noise() -> None:
    policy = Keyformer()
    other = dataclasses.replace(LAYER, prompt=dataclasses.replace(PROMPT, seed=1))
    first, again, different = (policy.score(observe(policy, layer)) for layer in (LAYER, LAYER, other))
    assert torch.equal(first, again)
    assert not torch.allclose(first, different, rtol=0.01)


@pytest.mark.parametrize("parameters", [{"rows": "some"}, {"recent_share": 1.1}])
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        Keyformer(**parameters)  # type: ignore[arg-type]
