"""Elastic Cache: the numbers of its rules (E1, E3, E4), and loops over the attention matrix."""

from __future__ import annotations

import pytest
import torch

from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.elastic_cache import ElasticCache
from prefill_worker.compression.rows import probe_rows
from prefill_worker.compression.statistics import ObservedLayer
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import (
    attention_matrix,
    observe,
    positions,
    prompt_shape,
    random_attention,
)

PROMPT = prompt_shape(230, range(3, 200), seed=8)


def test_dropped_tokens_join_the_nearest_anchor() -> None:
    """E1: anchors 2 and 6, key = position; token 4 is as near to both and goes to the lower one."""
    rows = torch.arange(9.0)[None, :, None]
    chosen = torch.zeros(1, 9, dtype=torch.bool)
    chosen[0, [0, 2, 6, 8]] = True
    layer = ObservedLayer(prompt=prompt_shape(9), key=rows, value=-rows, measured={})
    key, value = ElasticCache(start=1).merge(layer, chosen)
    assert key.flatten().tolist() == [0.0, 2.5, 6.0, 8.0]
    assert value.flatten().tolist() == [0.0, -2.5, -6.0, -8.0]


def test_the_highest_scores_are_kept_not_the_ranks_of_an_argsort() -> None:
    """E4."""
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.3]])
    assert positions(ElasticCache().select(scores, [2])) == [[0, 3]]


def naive(policy: ElasticCache, layer: ObservedLayer, attention: torch.Tensor, kept: int) -> tuple[list[int], list]:
    """Kept positions, and merged keys and values of each KV head, [head][key or value][kept]."""
    rows = range(230) if policy.rows == "all" else probe_rows(PROMPT)
    seen = [1 if policy.rows == "all" else sum(row >= at for row in rows) for at in range(230)]
    scores = [sum(attention[:, row, at].sum().item() for row in rows) / seen[at] for at in range(230)]
    protected = [*range(policy.start), 229]
    others = sorted((at for at in range(230) if at not in protected), key=lambda at: (-scores[at], at))
    anchors = sorted(others[: kept - len(protected)])
    chosen = sorted([*protected, *anchors])
    members = {at: [at] for at in chosen}
    for at in range(230):
        if at not in chosen:
            members[min(anchors, key=lambda anchor: (abs(anchor - at), anchor))].append(at)
    merged = [
        [[whole[head, members[at]].double().mean(dim=0) for at in chosen] for whole in (layer.key, layer.value)]
        for head in range(2)
    ]
    return chosen, merged


@pytest.mark.parametrize(("rows", "start"), [("all", 4), ("all", 0), ("probe", 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_naive_method(rows: str, start: int, dtype: torch.dtype) -> None:
    """E3: exactly the budgeted number in every layer."""
    policy = ElasticCache(rows=rows, start=start)
    attentions = [random_attention(PROMPT, seed=seed) for seed in (1, 2)]
    for attention in attentions:
        attention.key, attention.value = attention.key.to(dtype), attention.value.to(dtype)
    layers = [observe(policy, attention) for attention in attentions]
    selections = select_tokens(policy, layers, Budget(max_kept_tokens=33))
    for attention, layer, selection in zip(attentions, layers, selections, strict=True):
        chosen, merged = naive(policy, layer, attention_matrix(attention), 33)
        assert positions(selection) == [chosen] * 2
        assert selection.merged is not None
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        for index, rows_of_all_heads in enumerate(selection.merged):
            expected = torch.stack([row for head in merged for row in head[index]])
            torch.testing.assert_close(rows_of_all_heads.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parameters", [{"rows": "some"}, {"start": -1}, {"start": 15}])
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        ElasticCache(**parameters)  # type: ignore[arg-type]
