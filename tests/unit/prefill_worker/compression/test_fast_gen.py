"""FastGen against loops over the attention matrix, with heads of every kind."""

from __future__ import annotations

import math

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.fast_gen import FastGen
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import probe_rows
from shared.errors import InvalidRequestError
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import attention_matrix, observe, positions, random_attention

TOKENS, SPECIAL, PUNCTUATION, HEAVY = 200, (0, 1, 150), (40, 90, 170), (60, 61, 62, 120)
PROMPT = PromptShape(
    visual=torch.arange(TOKENS).clamp(5, 99) == torch.arange(TOKENS), special=SPECIAL, punctuation=PUNCTUATION, seed=4
)
KINDS = ("special", "punctuation", "local", "frequent", "full")


def layer_of_all_kinds() -> LayerAttention:
    """Five KV heads of two query heads each; keys are unit vectors, so that queries hold the logits."""
    weights = torch.full((5, TOKENS, TOKENS), 1e-5)
    rows, keys = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    near = (rows - keys >= 0) & (rows - keys < 12)
    weights[:, :, list(SPECIAL)] += 1.0
    weights[1, :, list(PUNCTUATION)] += 1.0
    weights[2:4] += near * 1.0
    weights[3, :, list(HEAVY)] += 3.0
    weights[4] += torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(2))
    jitter = torch.rand(2, 5, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)) * 0.2 + 0.9
    query = (weights * jitter).log().transpose(0, 1).reshape(10, TOKENS, TOKENS)
    key = torch.eye(TOKENS).expand(5, -1, -1)
    return LayerAttention(prompt=PROMPT, query=query, key=key, value=key, scaling=1.0)


LAYER = layer_of_all_kinds()
# [KV head][query head of the group][row][key]
ATTENTION = attention_matrix(LAYER).view(5, 2, TOKENS, TOKENS).tolist()
# local and frequent tokens are few, so that kinds differ in size
SHARES = {"local_share": 0.1, "frequent_share": 0.05}


def naive_wanted(group: list[list[list[float]]], rows: list[int], mass: float) -> tuple[str, set[int]]:
    """The kind of one KV head and what it keeps, found by masking each row."""
    sums = [sum(head[row][key] for head in group for row in rows) for key in range(TOKENS)]
    special, local = {*SPECIAL}, int(0.1 * TOKENS)
    marks, recent = special | {*PUNCTUATION}, {*range(TOKENS - local, TOKENS)}
    frequent = {*sorted(range(TOKENS), key=lambda at: (-sums[at], at))[: int(0.05 * TOKENS)]}
    kinds = [(special, 0, special), (marks, 0, marks), (marks, local, marks | recent)]
    kinds.append((marks | frequent, local, marks | recent | frequent))
    for name, (columns, reach, kept) in zip(KINDS, kinds, strict=False):
        seen = sum(
            head[row][key]
            for head in group
            for row in rows
            for key in range(row + 1)
            if key in columns or row - key < reach
        )
        if seen >= mass * len(rows) * len(group):
            return name, kept
    return "full", {*range(TOKENS)}


def listed(rows: str) -> list[int]:
    return [*range(TOKENS)] if rows == "all" else list(probe_rows(PROMPT))


@pytest.mark.parametrize("rows", ["all", "probe"])
def test_what_each_key_receives_from_the_rows_near_it(rows: str) -> None:
    policy = FastGen(rows=rows, **SHARES)
    _, near = policy.needs(PROMPT)
    expected = [
        [sum(head[row][key] for head in group for row in listed(rows) if 0 <= row - key < 20) for key in range(TOKENS)]
        for group in ATTENTION
    ]
    torch.testing.assert_close(observe(policy, LAYER)[near], torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", ["all", "probe"])
@pytest.mark.parametrize("mass", [0.5, 0.8, 0.95, 1.0])
def test_every_head_takes_the_cheapest_kind_that_has_enough(rows: str, mass: float) -> None:
    policy = FastGen(rows=rows, mass=mass, **SHARES)
    expected = [naive_wanted(group, listed(rows), mass) for group in ATTENTION]
    assert positions(policy.wanted(observe(policy, LAYER))) == [sorted(kept) for _, kept in expected]
    if mass == 0.8:
        assert [kind for kind, _ in expected] == [*KINDS], "one head of each kind"


@pytest.mark.parametrize("rows", ["all", "probe"])
def test_a_head_that_wants_more_than_it_gets_is_cut_by_its_mean_attention(rows: str) -> None:
    policy = FastGen(rows=rows, mass=0.8, **SHARES)
    (selection,) = select_tokens(policy, [observe(policy, LAYER)], Budget(max_kept_tokens=20))
    wanted = [kept for _, kept in (naive_wanted(group, listed(rows), 0.8) for group in ATTENTION)]
    # 3, 6 and what lies between 21 and 200: the last three share 100 - 3 - 6 tokens
    counts = [3, 6]
    for head in (2, 3, 4):
        counts.append(min(len(wanted[head]), (100 - sum(counts)) // (5 - len(counts))))
    assert selection.num_kept(5, TOKENS) == counts
    assert sum(counts) == 100
    for group, kept, count, found in zip(ATTENTION, wanted, counts, positions(selection), strict=True):
        rows_listed = listed(rows)
        means = {
            at: sum(head[row][at] for head in group for row in rows_listed) / sum(row >= at for row in rows_listed)
            for at in kept
        }
        assert found == sorted(sorted(kept, key=lambda at: (-means[at], at))[:count])


@pytest.mark.parametrize(
    ("wanted", "kept", "shares"),
    [
        ([3, 50, 9], 10, [3, 18, 9]),
        ([50, 50, 50], 10, [10, 10, 10]),
        ([2, 3, 4], 10, [2, 3, 4]),
        ([40, 1, 40], 7, [10, 1, 10]),
        ([40, 2, 40], 7, [9, 2, 10]),
        ([12], 5, [5]),
    ],
)
def test_small_wishes_come_first(wanted: list[int], kept: int, shares: list[int]) -> None:
    scores = torch.full((len(wanted), 60), -1.0)
    for head, count in enumerate(wanted):
        scores[head, :count] = 0.0
    assert FastGen().share_heads(scores, kept) == shares


def test_retention_is_a_limit_that_need_not_be_reached() -> None:
    policy = FastGen(mass=0.8, **SHARES)
    (selection,) = select_tokens(policy, [observe(policy, LAYER)], Budget(retention=0.9))
    kept = selection.num_kept(5, TOKENS)
    assert kept[:2] == [3, 6]
    assert kept[4] == TOKENS
    assert sum(kept) < 5 * 180


def test_without_special_tokens_the_near_ones_are_the_cheapest() -> None:
    prompt = PromptShape(visual=torch.zeros(TOKENS, dtype=torch.bool))
    layer = random_attention(prompt, seed=1, spread=0.0)
    policy = FastGen(mass=0.2, local_share=0.3)
    assert positions(policy.wanted(observe(policy, layer))) == [[*range(140, 200)]] * 2


@pytest.mark.parametrize(
    "parameters",
    [{"rows": "some"}, {"mass": 0.0}, {"mass": math.nan}, {"local_share": 1.1}, {"frequent_share": -0.3}],
)
def test_bad_parameters_are_refused(parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=f"fast_gen: {next(iter(parameters))}"):
        FastGen(**parameters)  # type: ignore[arg-type]
