"""V9: budgets that tighten layer by layer end with the sets of one-shot selection, and never hold much more.

What makes a cascade possible: after each layer, allocating the whole total to the layers seen so far bounds each
of them from above, and selections nest.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.budget import FLOOR, strict_bounds, strict_budget
from prefill_worker.compression.policy import TokenBudget
from prefill_worker.compression.selection import best_tokens, share_of, with_recent

RECENT = 0.1


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[float], torch.Tensor, float]:
    """Densities per layer, scores [layers, heads, tokens] with ties, and a retention."""
    num_layers, num_tokens = draw(st.integers(2, 12)), draw(st.integers(20, 120))
    densities = draw(st.lists(st.floats(0.005, 1.0), min_size=num_layers, max_size=num_layers))
    seed, levels = draw(st.integers(0, 2**31)), draw(st.sampled_from((3, 50, 10_000)))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (num_layers, 2, num_tokens), generator=generator).float()
    return densities, scores, draw(st.sampled_from((0.02, 0.1, 0.25, 0.5, 0.9)))


@given(prompts())
def test_a_cascade_ends_with_the_sets_of_one_shot(prompt: tuple[list[float], torch.Tensor, float]) -> None:
    densities, scores, retention = prompt
    num_layers, _, num_tokens = scores.shape
    budget = TokenBudget(retention=Fraction(str(retention)), num_tokens=num_tokens, num_layers=num_layers)
    low = min(1.0, max(min(FLOOR, retention), 1 / num_tokens))
    final = strict_budget(densities, budget, min_tokens=1)
    held: list[torch.Tensor] = []
    peak = 0
    for layer in range(num_layers):
        held.append(torch.arange(num_tokens).expand(2, -1))
        peak = max(peak, sum(tokens.shape[1] for tokens in held))
        limits = strict_bounds(densities[: layer + 1], budget, min_tokens=1)
        held = [_truncate(scores[i], tokens, limits[i]) for i, tokens in enumerate(held)]
    for layer, kept in enumerate(final):
        assert kept <= held[layer].shape[1]
        one_shot = select_top(scores[layer], kept)
        assert torch.equal(_truncate(scores[layer], held[layer], kept), one_shot)
    allowed = max(retention, low) + 1 / num_layers + 1 / num_tokens
    assert peak <= allowed * num_layers * num_tokens + 1e-6


def select_top(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Positions [heads, kept] of the best tokens and the recent window."""
    chosen = best_tokens(with_recent(scores, share_of(kept, RECENT)), [kept] * len(scores))
    return chosen.nonzero()[:, 1].view(len(scores), kept)


def _truncate(scores: torch.Tensor, held: torch.Tensor, kept: int) -> torch.Tensor:
    """The best `kept` of the tokens still held."""
    kept = min(kept, held.shape[1])
    return held.gather(1, select_top(scores.gather(1, held), kept))
