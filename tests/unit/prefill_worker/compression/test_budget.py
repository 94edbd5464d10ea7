"""How a token budget is shared among layers: the published examples, and what holds for every input."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefill_worker.compression.budget import FLOOR, paper_budget, round_to_total, strict_budget
from prefill_worker.compression.policy import TokenBudget
from shared.request.params import MIN_KEPT_TOKENS, Budget

BUDGETS = {"strict": strict_budget, "paper": paper_budget}


def allocate(mode: str, sparsity: tuple[float, ...], retention: str, tokens: int, min_tokens: int = 1) -> list[int]:
    budget = TokenBudget(retention=Fraction(retention), num_tokens=tokens, num_layers=len(sparsity))
    return BUDGETS[mode]([1.0 - share for share in sparsity], budget, min_tokens)


@pytest.mark.parametrize(
    ("mode", "sparsity", "retention", "tokens", "expected"),
    [
        # V1: both modes agree where nothing is clipped
        ("strict", (0.5, 0.9, 0.9, 0.9), "0.1", 10_000, [2500, 500, 500, 500]),
        ("paper", (0.5, 0.9, 0.9, 0.9), "0.1", 10_000, [2500, 500, 500, 500]),
        # V2: the floor of 1 %
        ("strict", (0.5, 0.9, 0.9, 0.9), "0.015", 10_000, [300, 100, 100, 100]),
        ("paper", (0.5, 0.9, 0.9, 0.9), "0.015", 10_000, [375, 100, 100, 100]),
        # V3: the floor everywhere
        ("strict", (0.5, 0.9, 0.9, 0.9), "0.01", 10_000, [100, 100, 100, 100]),
        ("paper", (0.5, 0.9, 0.9, 0.9), "0.01", 10_000, [250, 100, 100, 100]),
        # V4: the cap
        ("strict", (0.1, 0.9, 0.9, 0.9), "0.4", 30_000, [30_000, 6000, 6000, 6000]),
        ("paper", (0.1, 0.9, 0.9, 0.9), "0.4", 30_000, [30_000, 4000, 4000, 4000]),
        # V5: rounding; the total is floor(0.1 * 4 * 105) = 42
        ("strict", (0.5, 0.9, 0.9, 0.9), "0.1", 105, [27, 5, 5, 5]),
        ("paper", (0.5, 0.9, 0.9, 0.9), "0.1", 105, [26, 5, 5, 5]),
    ],
)
def test_published_examples(
    mode: str, sparsity: tuple[float, ...], retention: str, tokens: int, expected: list
) -> None:
    assert allocate(mode, sparsity, retention, tokens) == expected


@pytest.mark.parametrize("mode", BUDGETS)
@pytest.mark.parametrize(("tokens", "expected"), [(40, 16), (10, 10), (16, 16), (17, 16)])
def test_short_prompts_keep_the_least_number_of_tokens_or_all(mode: str, tokens: int, expected: int) -> None:
    """V10."""
    assert allocate(mode, (0.5, 0.9, 0.9, 0.9), "0.1", tokens, min_tokens=16) == [expected] * 4


DENSITIES = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=12)
RETENTIONS = st.floats(0.001, 1.0, exclude_max=True)
TOKENS = st.integers(1, 4000)
MODES = st.sampled_from([*BUDGETS])
MIN_TOKENS = st.integers(1, MIN_KEPT_TOKENS)


def token_budget(densities: list[float], retention: float, tokens: int) -> TokenBudget:
    return TokenBudget(
        retention=Budget(retention=retention).share_of(tokens), num_tokens=tokens, num_layers=len(densities)
    )


@given(densities=DENSITIES, retention=RETENTIONS, tokens=TOKENS, min_tokens=MIN_TOKENS)
@example(densities=[0.5] * 3, retention=0.4999999999, tokens=10, min_tokens=1)
@example(densities=[0.5] * 3, retention=0.49999999999999994, tokens=10, min_tokens=1)
@example(densities=[1.0, 1e-4, 1e-4], retention=0.29, tokens=100, min_tokens=16)
def test_strict_keeps_its_total_to_the_token(
    densities: list[float], retention: float, tokens: int, min_tokens: int
) -> None:
    budget = token_budget(densities, retention, tokens)
    kept = strict_budget(densities, budget, min_tokens)
    exact = Fraction(str(retention)) * len(densities) * tokens
    if budget.retention * tokens >= min_tokens:
        assert sum(kept) == exact.numerator // exact.denominator
    else:
        assert sum(kept) == max(int(exact), len(densities) * min(tokens, min_tokens))


@given(densities=DENSITIES, retention=RETENTIONS, tokens=TOKENS, min_tokens=MIN_TOKENS, mode=MODES)
def test_every_layer_stays_within_its_bounds(
    densities: list[float], retention: float, tokens: int, min_tokens: int, mode: str
) -> None:
    kept = BUDGETS[mode](densities, token_budget(densities, retention, tokens), min_tokens)
    floor = max(min(tokens, min_tokens), int(min(FLOOR, retention) * tokens))
    assert len(kept) == len(densities)
    assert all(floor <= count <= tokens for count in kept)


@given(densities=DENSITIES, retention=RETENTIONS, tokens=TOKENS, min_tokens=MIN_TOKENS, mode=MODES)
def test_a_denser_layer_never_gets_less_than_rounding_explains(
    densities: list[float], retention: float, tokens: int, min_tokens: int, mode: str
) -> None:
    kept = BUDGETS[mode](densities, token_budget(densities, retention, tokens), min_tokens)
    for i, denser in enumerate(densities):
        for j, sparser in enumerate(densities):
            if denser >= sparser:
                # a remainder that is equal to 2**-20 goes to the lower layer
                assert kept[i] >= kept[j] - (1 if mode == "strict" and j < i else 0)


@given(densities=DENSITIES, retention=RETENTIONS, tokens=TOKENS, min_tokens=MIN_TOKENS, mode=MODES)
def test_no_policy_exceeds_what_the_router_reserves(
    densities: list[float], retention: float, tokens: int, min_tokens: int, mode: str
) -> None:
    kept = BUDGETS[mode](densities, token_budget(densities, retention, tokens), min_tokens)
    bound = Budget(retention=retention).kept_tokens_bound(0, tokens)
    assert sum(kept) <= bound * len(densities)
    # and it may be computed from an upper bound of the prompt's length
    assert bound <= Budget(retention=retention).kept_tokens_bound(0, tokens + 100)


@given(densities=DENSITIES, count=st.integers(1, 5000), tokens=TOKENS, mode=MODES)
def test_a_budget_in_tokens_is_kept_like_a_share(densities: list[float], count: int, tokens: int, mode: str) -> None:
    asked = Budget(max_kept_tokens=count)
    share = asked.share_of(tokens)
    if share == 1:
        return
    kept = BUDGETS[mode](densities, TokenBudget(retention=share, num_tokens=tokens, num_layers=len(densities)), 1)
    assert sum(kept) <= asked.kept_tokens_bound(0, tokens) * len(densities)
    if mode == "strict":
        assert sum(kept) == count * len(densities)


def test_a_decimal_share_is_not_rounded_down_to_its_binary_neighbour() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert allocate("strict", (0.9, 0.9), "0.29", 100) == [29, 29]
    assert allocate("paper", (0.9, 0.9), "0.29", 100) == [29, 29]


@pytest.mark.parametrize(
    ("wanted", "total", "cap", "expected"),
    [
        ([1.5, 1.5, 1.0], 4, 9, [2, 1, 1]),  # a tie goes to the lower layer
        ([1.5, 1.5 + 1e-12, 1.0], 4, 9, [2, 1, 1]),  # noise decides no tie
        ([1.2, 1.7, 1.1], 4, 9, [1, 2, 1]),  # the largest remainder wins
        ([2.9, 2.9, 0.2], 6, 3, [3, 3, 0]),
        ([3.0, 2.6, 0.4], 6, 3, [3, 3, 0]),
        ([3.0, 3.0, 0.1], 8, 3, [3, 3, 2]),  # full layers pass on what they cannot take
        ([1.0, 1.0, 1.0], 3, 1, [1, 1, 1]),
        ([5 - 1e-10] * 3, 14, 9, [5, 5, 4]),  # each within noise of 5, but not all of them
    ],
)
def test_rounding(wanted: list[float], total: int, cap: int, expected: list[int]) -> None:
    assert round_to_total(wanted, total, cap) == expected
