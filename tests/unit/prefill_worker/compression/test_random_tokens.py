"""The baseline: what is drawn depends on the prompt's content alone."""

from __future__ import annotations

import torch

from prefill_worker.compression.pipeline import select_tokens
from prefill_worker.compression.policies.random_tokens import RandomTokens
from shared.request.params import Budget
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape, random_attention


def kept_with(seed: int, attention: int = 0) -> list[list[int]]:
    layer = random_attention(prompt_shape(400, range(5, 300), seed=seed), seed=attention)
    (selection,) = select_tokens(RandomTokens(), [observe(RandomTokens(), layer)], Budget(retention=0.25))
    return positions(selection)


def test_the_choice_is_the_prompt_s_and_looks_at_nothing() -> None:
    assert kept_with(seed=7) == kept_with(seed=7, attention=1)
    assert kept_with(seed=7) != kept_with(seed=8)
    assert kept_with(seed=(1 << 64) - 1)[0], "the whole range of a content hash is a seed"


def test_each_head_draws_for_itself_and_every_token_has_the_same_chance() -> None:
    first, second = kept_with(seed=7)
    assert len(first) == len(second) == 100
    assert 10 < len({*first} & {*second}) < 45, "25 in the mean"
    drawn = torch.zeros(400)
    for seed in range(200):
        for head in kept_with(seed):
            drawn[head] += 1
    # binomial with 400 draws of 1/4: mean 100, standard deviation 8.7
    assert drawn.min() > 100 - 6 * 8.7
    assert drawn.max() < 100 + 6 * 8.7
