"""What a reservation promises is enough for what compression keeps, whatever the attention looked like."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.budget import paper_budget, strict_budget
from prefill_worker.compression.policy import TokenBudget
from shared.request.params import MIN_KEPT_TOKENS, Budget

budgets = st.one_of(
    st.floats(1e-6, 1.0).map(lambda retention: Budget(retention=retention)),
    st.integers(1, 5000).map(lambda tokens: Budget(max_kept_tokens=tokens)),
)
densities = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=8)


@given(budgets, densities, st.integers(1, 3000), st.integers(0, 500))
def test_no_allocation_keeps_more_than_the_bound(
    budget: Budget, layers: list[float], prompt: int, overestimate: int
) -> None:
    asked = TokenBudget(retention=budget.share_of(prompt), num_tokens=prompt, num_layers=len(layers))
    bound = budget.kept_tokens_bound(overestimate, prompt) * len(layers)
    assert sum(strict_budget(layers, asked, MIN_KEPT_TOKENS)) <= bound
    assert sum(paper_budget(layers, asked, MIN_KEPT_TOKENS)) <= bound


@given(budgets, st.integers(1, 100_000))
def test_the_bound_covers_the_share_and_never_exceeds_the_prompt(budget: Budget, prompt: int) -> None:
    bound = budget.kept_tokens_bound(0, prompt)
    assert budget.share_of(prompt) * prompt <= bound <= prompt


@given(st.floats(0, 1, exclude_min=True, allow_subnormal=False))
def test_a_share_reads_like_the_number_that_was_sent(retention: float) -> None:
    share = Budget(retention=retention).share_of(100)
    assert float(share) == retention
    assert share == Fraction(repr(retention))
