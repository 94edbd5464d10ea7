"""Shares of the tokens seen so far: in integers, since a step decides on exact ones."""

from __future__ import annotations

from fractions import Fraction


def share_of(retention: Fraction, tokens: int) -> int:
    """ceil(retention * tokens)."""
    return -(-tokens * retention.numerator // retention.denominator)
