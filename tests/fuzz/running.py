"""As many cases as there is time for; each can be made again from what a failure prints."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

SECONDS = float(os.environ.get("FUZZ_S", "20"))
SEED = os.environ.get("FUZZ_SEED") or secrets.token_hex(4)
# with a seed: the case that failed, alone
CASE = os.environ.get("FUZZ_CASE")
LEAST = 50


def fuzz(check: Callable[[random.Random], object]) -> None:
    """Calls `check` with another source of randomness each time; it raises where something is wrong."""
    for number, chance in _cases():
        with _named(number):
            check(chance)


async def fuzz_served(check: Callable[[random.Random], Awaitable[object]]) -> None:
    """The same on the loop of a server that goes on from case to case."""
    for number, chance in _cases():
        with _named(number):
            await check(chance)


def _cases() -> Iterator[tuple[int, random.Random]]:
    numbers = [int(CASE)] if CASE else range(1 << 40)
    give_up = time.monotonic() + SECONDS
    for number in numbers:
        if number >= LEAST and not CASE and time.monotonic() > give_up:
            return
        yield number, random.Random(f"{SEED} {number}")


@contextlib.contextmanager
def _named(number: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        pytest.fail(f"FUZZ_SEED={SEED} FUZZ_CASE={number}: {type(error).__name__}: {error}", pytrace=True)
