"""As many cases as there is time for; each can be made again from what a failure prints."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections.abc import Callable

import pytest

SECONDS = float(os.environ.get("FUZZ_S", "20"))
SEED = os.environ.get("FUZZ_SEED") or secrets.token_hex(4)
# with a seed: the case that failed, alone
CASE = os.environ.get("FUZZ_CASE")
LEAST = 50


def fuzz(check: Callable[[random.Random], object]) -> None:
    """Calls `check` with another source of randomness each time; it raises where something is wrong."""
    numbers = [int(CASE)] if CASE else range(1 << 40)
    give_up = time.monotonic() + SECONDS
    for number in numbers:
        if number >= LEAST and not CASE and time.monotonic() > give_up:
            return
        try:
            check(random.Random(f"{SEED} {number}"))
        except Exception as error:
            pytest.fail(f"FUZZ_SEED={SEED} FUZZ_CASE={number}: {type(error).__name__}: {error}", pytrace=True)
