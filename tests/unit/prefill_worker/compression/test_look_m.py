"""LOOK-M: the numbers of its merging rules, and loops over the attention matrix."""

from __future__ import annotations

import pytest
import torch

from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.look_m import LookM
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

# two query heads share each KV head
PROMPT = prompt_shape(200, [*range(4, 120), *range(125, 180)], seed=3)
MERGES = {
    "averaged": lambda x, members: (x + sum(y for y, _ in members)) / (len(members) + 1),
    "pivotal": lambda x, members: (x + sum((y + x) / 2 for y, _ in members)) / (len(members) + 1),
    "weighted": lambda x, members: (x + sum(cosine * y for y, cosine in members)) / (len(members) + 1),
}


@pytest.mark.parametrize(("merging", "expected"), [("averaged", 14 / 3), ("pivotal", 10 / 3), ("weighted", 14 / 3)])
def test_two_members(merging: str, expected: float) -> None:
    """x = 2, y = (4, 8): keys of one direction, so that every cosine is 1."""
    rows = torch.tensor([[[4.0], [2.0], [8.0]]])
    layer = ObservedLayer(prompt=prompt_shape(3), key=rows, value=rows, measured={})
    key, value = LookM(merging=merging).merge(layer, torch.tensor([[False, True, False]]))
    assert key.flatten().tolist() == value.flatten().tolist() == [pytest.approx(expected)]


def naive_choice(policy: LookM, attention: torch.Tensor, kept: int) -> list[int]:
    """One KV head; attention is [group, tokens, tokens]."""
    rows = list(range(200) if policy.rows == "all" else probe_rows(PROMPT))
    summed = attention.sum(dim=0)[rows].tolist()
    scores = [sum(row[at] for row in summed) for at in range(200)]
    if policy.rows == "probe":
        scores = [score / sum(row >= at for row in rows) for at, score in enumerate(scores)]
    highest = max(scores)
    scores = [score + (0 if PROMPT.visual[at] else highest) for at, score in enumerate(scores)]
    window = min(int(200 * policy.recent_share + 1e-9), kept // 2)
    best = sorted(range(200 - window), key=lambda at: (-scores[at], at))[: kept - window]
    return sorted([*best, *range(200 - window, 200)])


def naive_merge(merging: str, key: torch.Tensor, value: torch.Tensor, chosen: list[int]) -> list[list[torch.Tensor]]:
    """One KV head, [key or value][kept]."""
    members: dict[int, list[tuple[int, float]]] = {at: [] for at in chosen}
    for at in range(200):
        if at not in chosen:
            cosines = [torch.cosine_similarity(key[at], key[other], dim=0).item() for other in chosen]
            members[chosen[cosines.index(max(cosines))]].append((at, max(cosines)))
    return [
        [MERGES[merging](whole[at], [(whole[other], cosine) for other, cosine in members[at]]) for at in chosen]
        for whole in (key, value)
    ]


@pytest.mark.parametrize(
    ("merging", "rows", "kept"),
    [("pivotal", "all", 60), ("averaged", "all", 30), ("weighted", "all", 60), ("pivotal", "probe", 60)],
)
def test_it_is_the_naive_method(merging: str, rows: str, kept: int) -> None:
    """60 of 200: the window is a tenth of the prompt; 30: half of what is kept."""
    policy = LookM(merging=merging, rows=rows)
    attention = random_attention(PROMPT, seed=5)
    layer = observe(policy, attention)
    (selection,) = select_tokens(policy, [layer], Budget(max_kept_tokens=kept))
    expected = [naive_choice(policy, head, kept) for head in attention_matrix(attention).view(2, 2, 200, 200)]
    assert positions(selection) == expected
    assert selection.merged is not None
    rows_of = [
        naive_merge(merging, layer.key[head].double(), layer.value[head].double(), chosen)
        for head, chosen in enumerate(expected)
    ]
    for index, merged in enumerate(selection.merged):
        whole = torch.stack([row for head in rows_of for row in head[index]])
        torch.testing.assert_close(merged.double(), whole, rtol=1e-5, atol=1e-5)


def test_text_comes_before_vision() -> None:
    policy = LookM(recent_share=0.0)
    (selection,) = select_tokens(
        policy, [observe(policy, random_attention(PROMPT, seed=5))], Budget(max_kept_tokens=40)
    )
    text = (~PROMPT.visual).nonzero().flatten().tolist()
    assert len(text) < 40
    assert all(set(text) <= set(head) for head in positions(selection))


@pytest.mark.parametrize("parameters", [{"rows": "some"}, {"recent_share": 1.1}, {"merging": "mean"}])
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(parameters))):
        LookM(**parameters)  # type: ignore[arg-type]
