"""How far a request's budget may shrink when decode memory is short."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from shared.request.params import Budget

# Each step down keeps this share of the one before.
STEP = Fraction(3, 4)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A budget that a request puts up with, and the memory that it takes."""

    budget: Budget
    share: Fraction
    """Of what was asked for; 1 is exactly that."""
    kept_tokens_bound: int
    """Bound of the mean number of kept tokens per layer."""


def offers_of(asked: Budget, floor: float, text_tokens: int, visual_tokens: int) -> tuple[Offer, ...]:
    """What was asked for, then step by step less, down to the floor; steps that would save no memory are left out.

    Args:
        floor: Least kept share of the budget's tokens, also where it is a count; what was asked for or more lowers
            nothing.
        text_tokens, visual_tokens: Upper bounds of the prompt's. Shares of a bound are more than those of the prompt,
            so a count never ends below the floor.
    """
    offers = [_offer(asked, Fraction(1), text_tokens, visual_tokens)]
    tokens = asked.tokens_of(text_tokens, visual_tokens)
    for share in _shares(_lowest(asked, floor, tokens)) if tokens else ():
        offer = _offer(asked.lowered(share), share, text_tokens, visual_tokens)
        if offer.kept_tokens_bound < offers[-1].kept_tokens_bound:
            offers.append(offer)
    return tuple(offers)


def _offer(budget: Budget, share: Fraction, text_tokens: int, visual_tokens: int) -> Offer:
    bound = budget.kept_tokens_bound(text_tokens, visual_tokens)
    return Offer(budget=budget, share=share, kept_tokens_bound=bound)


def _lowest(asked: Budget, floor: float, tokens: int) -> Fraction:
    """The floor as a share of what was asked for; one token at least."""
    least = max(Fraction(str(floor)), Fraction(1, tokens))
    if asked.max_kept_tokens is not None:
        return Fraction(math.ceil(least * tokens), asked.max_kept_tokens)
    return least / asked.share_of(tokens)


def _shares(lowest: Fraction) -> Iterator[Fraction]:
    share = STEP
    while share > lowest:
        yield share
        share *= STEP
    if lowest < 1:
        yield lowest
