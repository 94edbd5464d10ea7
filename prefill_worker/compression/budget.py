"""Shares of a token budget among layers (policies: VL-Cache, arXiv 2410.23317)."""

from __future__ import annotations

from collections.abc import Sequence

from prefill_worker.compression.policy import TokenBudget
from shared.request.params import FLOOR_SHARE

FLOOR = float(FLOOR_SHARE)
# Smaller ones differ by less than a token of the longest prompt.
LEAST_RATIO = 1e-12
# Remainders are compared as integers: floating-point noise must not decide a tie.
REMAINDER_SCALE = 1 << 20
BISECTION_STEPS = 100


def strict_budget(densities: Sequence[float], budget: TokenBudget, min_tokens: int) -> list[int]:
    """Water-filling: shares clip(c * d_l, lo, 1) with c such that their mean is the retention exactly.

    Args:
        densities: d_l = 1 - sparsity, positive, one per layer.
        budget: Its total is kept to the token, unless every layer needs `min_tokens` already.
        min_tokens: Fewest tokens of a layer (all of them when the prompt is shorter).
    """
    tokens, low = budget.num_tokens, _smallest_share(budget, min_tokens)
    total = max(budget.total, budget.num_layers * min(tokens, min_tokens))
    shares = water_fill(densities, max(float(budget.retention), low), low)
    return round_to_total([share * tokens for share in shares], total, tokens)


def strict_bounds(densities: Sequence[float], budget: TokenBudget, min_tokens: int) -> list[int]:
    """Most tokens that `strict_budget` may give to the first layers: what it gives if no other layer takes any.

    Shares are rounded up, to more than what rounding to the total can make of them.

    Args:
        densities: Of the first layers, some of `budget.num_layers`.
    """
    tokens, low = budget.num_tokens, _smallest_share(budget, min_tokens)
    mean = max(float(budget.retention), low) * budget.num_layers / len(densities)
    shares = water_fill(densities, min(1.0, mean), low)
    return [min(tokens, int(share * tokens + 1e-9) + 1) for share in shares]


def strict_lower_bounds(densities: Sequence[float], budget: TokenBudget, min_tokens: int) -> list[int]:
    """Fewest tokens that `strict_budget` may give to the first layers: what others, as dense as can be, leave.

    Shares are rounded down, to less than what rounding to the total can make of them.

    Args:
        densities: Of the first layers; at most 1, and no other layer has more.
    """
    tokens, low = budget.num_tokens, _smallest_share(budget, min_tokens)
    shares = water_fill(_with_densest(densities, budget), max(float(budget.retention), low), low)
    return [max(0, int(share * tokens + 1e-9) - 1) for share in shares[: len(densities)]]


def paper_lower_bounds(densities: Sequence[float], budget: TokenBudget, min_tokens: int) -> list[int]:
    """As `strict_lower_bounds`, of `paper_budget`, which rounds each layer by itself."""
    return paper_budget(_with_densest(densities, budget), budget, min_tokens)


def paper_budget(densities: Sequence[float], budget: TokenBudget, min_tokens: int) -> list[int]:
    """As published: clip(d_l / sum(d) * retention * L, 0.01, 1) without renormalisation; each layer rounded down."""
    scale = float(budget.retention) * budget.num_layers / sum(densities)
    tokens = budget.num_tokens
    shares = [min(1.0, max(FLOOR, density * scale)) for density in densities]
    # 1e-9: a share such as 0.29 times 100 must not round down to 28
    return [max(int(share * tokens + 1e-9), min(tokens, min_tokens)) for share in shares]


def uniform_budget(densities: Sequence[float], budget: TokenBudget, min_tokens: int) -> list[int]:
    """What the others are compared with: the same in every layer, rounded down, whatever the densities."""
    return budget.uniform(min_tokens)


def round_to_total(wanted: Sequence[float], total: int, cap: int) -> list[int]:
    """Integers near `wanted` that sum to `total`: largest remainder first, ties to the lower layer."""
    kept = [min(cap, int(tokens + 1e-9)) for tokens in wanted]
    remainders = [round((tokens - whole) * REMAINDER_SCALE) for tokens, whole in zip(wanted, kept, strict=True)]
    order = sorted(range(len(kept)), key=lambda layer: (-remainders[layer], layer))
    if sum(kept) > total:
        # the tolerance rounded one up too many; the largest layer misses it least
        kept[max(range(len(kept)), key=lambda layer: (kept[layer], layer))] -= 1
    missing = total - sum(kept)
    while missing > 0:
        open_layers = [layer for layer in order if kept[layer] < cap][:missing]
        assert open_layers, "the total exceeds what the layers hold"
        for layer in open_layers:
            kept[layer] += 1
        missing -= len(open_layers)
    return kept


def share_surplus(wanted: Sequence[int], caps: Sequence[int]) -> list[int]:
    """What some layers have beyond what they can hold goes to the others, the same to each as far as they can.

    Args:
        wanted: Tokens of each layer.
        caps: Most tokens of each layer.
    """
    kept = [min(tokens, cap) for tokens, cap in zip(wanted, caps, strict=True)]
    surplus = sum(wanted) - sum(kept)
    while surplus and (open_layers := [layer for layer, cap in enumerate(caps) if kept[layer] < cap]):
        for layer in open_layers[:surplus]:
            more = min(max(1, surplus // len(open_layers)), caps[layer] - kept[layer])
            kept[layer] += more
        surplus = sum(wanted) - sum(kept)
    return kept


def _with_densest(densities: Sequence[float], budget: TokenBudget) -> list[float]:
    return [*densities, *[1.0] * (budget.num_layers - len(densities))]


def _smallest_share(budget: TokenBudget, min_tokens: int) -> float:
    return min(1.0, max(min(FLOOR, float(budget.retention)), min_tokens / budget.num_tokens))


def water_fill(densities: Sequence[float], mean: float, low: float) -> list[float]:
    """Shares clip(c * d_l, low, 1) with mean `mean`; c by bisection (the mean grows with c).

    Args:
        densities: Not negative; only their ratios matter, and none below `LEAST_RATIO` of the largest.
        mean: In [low, 1].
        low: Smallest share.
    """
    # they may be as small as numbers can be, where their reciprocals are none, and then all zero
    largest = max(densities) or 1.0
    ratios = [max(LEAST_RATIO, density / largest) for density in densities]

    def shares(c: float) -> list[float]:
        return [min(1.0, max(low, c * ratio)) for ratio in ratios]

    below, above = 0.0, 1.0 / min(ratios)
    for _ in range(BISECTION_STEPS):
        middle = (below + above) / 2
        if sum(shares(middle)) < mean * len(densities):
            below = middle
        else:
            above = middle
    return shares(above)
