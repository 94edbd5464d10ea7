"""Which attention rows are observed: positions of the queries that say what matters."""

from __future__ import annotations

import random

from prefill_worker.compression.prompt_shape import PromptShape

Rows = range | tuple[int, ...]
"""Ascending positions; a range ends with the prompt."""

# Rows observed when no text follows the last image, or there is no image.
FALLBACK_ROWS = 50
# Post-vision rows observed at most, unless a policy says otherwise.
MAX_ROWS = 64
# Probes: so many recent rows and as many random ones stand for all rows (ZipVL, arXiv 2410.08584).
PROBE_ROWS = 64


def post_vision_rows(prompt: PromptShape, max_rows: int = MAX_ROWS) -> range:
    """Positions after the last visual token; the last `max_rows` of them when there are more (0 = no cap)."""
    end = prompt.num_tokens
    first = end if prompt.last_visual is None else prompt.last_visual + 1
    if first == end:
        first = max(0, end - FALLBACK_ROWS)
    if max_rows:
        first = max(first, end - max_rows)
    return range(first, end)


def last_rows(prompt: PromptShape, window: int) -> range:
    """The observation window: the last `window` positions, or all of a shorter prompt."""
    return range(max(0, prompt.num_tokens - window), prompt.num_tokens)


def all_rows(prompt: PromptShape) -> range:
    """Every position."""
    return range(prompt.num_tokens)


def probe_rows(prompt: PromptShape) -> Rows:
    """`PROBE_ROWS` recent positions and as many random earlier ones; all of a prompt that has no more."""
    recent = last_rows(prompt, PROBE_ROWS)
    if recent.start <= PROBE_ROWS:
        return all_rows(prompt)
    drawn = random.Random(prompt.seed).sample(range(recent.start), PROBE_ROWS)  # noqa: S311 - no secret
    return (*sorted(drawn), *recent)


def run_at_the_end(rows: Rows, num_tokens: int) -> range:
    """The last ones of the rows, which follow each other up to the prompt's end."""
    first = num_tokens
    for row in reversed(rows):
        if row != first - 1:
            break
        first = row
    return range(first, num_tokens)
